# SPDX-License-Identifier: Apache-2.0
"""Options of the fine-tuning script: each mistake is one line, before a model is read."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from tests.training.running import ROOT, SCRIPTS, alpaca_command, options
from v2.train_scripts import finetune

INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize("wrong", [{"GPUS": text} for text in ("x", "1.5", "1 2", "-1", "0x10", "a[0]", "9" * 20)], ids=str)
def test_settings_of_the_alpaca_script_that_are_none_are_one_line(data: Path, wrong: dict[str, str]) -> None:
    """1.5 GPUs trained on the CPU."""
    script, env = SCRIPTS / "finetune_alpaca.sh", {**os.environ, "DATA": str(data), **wrong}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("finetune_alpaca: GPUS=") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("folder", [ROOT, ROOT / "v2"], ids=["root", "v2"])
def test_alpaca_script_finds_its_program_from_any_folder(
    data: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    script = (SCRIPTS / "finetune_alpaca.sh").relative_to(folder)
    program, *given = alpaca_command(tmp_path, script, "--max_steps", 3, MODEL="m", DATA=data, OUTPUT="out")
    assert Path(program) == SCRIPTS / "finetune.py"
    assert given[given.index("--model_name_or_path") + 1] == "m" and given[-2:] == ["--max_steps", "3"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--wibble", "3"], "--wibble"),
        (["--on_bad_record", "ignore"], "ignore"),
        (["--merge_lora"], "--lora"),
        (["--lear", "1"], "--lear"),
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--include_tokens_per_second", "true"], "use --include_num_input_tokens_seen"),
        (["--warmup-ratio=0.1"], "use --warmup_share"),
        (["--block_size", "512"], "use --context_length"),
        (["--max_steps", "0"], "--max_steps 0 must be at least 1; without it --num_train_epochs decides"),
    ],
    ids=[
        "unknown",
        "value",
        "needs lora",
        "abbreviation",
        "near",
        "replaced",
        "replaced by this script",
        "published",
        "no steps",
    ],
)
def test_bad_options_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "use" in message and argv[0].partition("=")[0].strip("-").replace("-", "_") in INHERITED:
        pytest.skip("this transformers still has the option")
    with pytest.raises(SystemExit) as stopped:
        finetune.main([*options(Path("m"), Path("d"), Path("o")), *argv])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.splitlines()) == 1 and message in said


def test_what_replaces_an_option_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.parse(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    for name, hint in finetune.REPLACED.items():
        if name not in INHERITED:  # an older transformers still has the option, and not yet what replaces it
            assert set(re.findall(r"--\w+", hint)) <= known, hint


def test_context_must_hold_whole_blocks(qwen2: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.main(options(qwen2, data, tmp_path, context_length=100))
    assert re.search(r"^finetune: context_length=100 .* bd_size=8$", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("asked", ["--fp16", "accelerate launch"])
def test_fp16_on_a_cpu_is_refused(
    qwen2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, asked: str
) -> None:
    """It trained in float32 without a word."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" if asked == "--fp16" else "fp16")
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=1, fp16=asked == "--fp16"))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "fp16 needs a GPU; --bf16" in error


@pytest.mark.parametrize("name", finetune.RANGES)
def test_numbers_have_limits(capsys: Any, name: str) -> None:
    least, most = finetune.RANGES[name]
    kinds = {field.name: str(field.type) for kind in finetune.KINDS for field in dataclasses.fields(kind)}
    wrong = [least - 1, int(most) + 1] if "int" in kinds[name] else ["nan", least - 1, most * 2 + 1]
    for value in wrong:
        with pytest.raises(SystemExit) as stopped:
            finetune.main([*options(Path("m"), Path("d"), Path("o")), f"--{name}", str(value)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert f"--{name} " in error and "must lie in" in error and error.count("\n") == 1


ODD = ["", "-1", "nan", "inf", "1e400", "x", "9" * 30, "1.5", "{", "[1]", '{"a": 1}', "a\nb"]


def test_no_value_of_any_option_is_a_traceback(capsys: Any) -> None:
    """Whatever transformers makes of it: an infinite --save_steps and an unknown key of --accelerator_config were some."""
    names = [field.name for kind in finetune.KINDS for field in dataclasses.fields(kind) if field.init]
    for name in names:
        for value in ODD:
            try:
                finetune.parse([*options(Path("m"), Path("d"), Path("o")), f"--{name}={value}"])
                assert value, name
            except SystemExit as stopped:
                assert stopped.code == 2, name
                assert len(capsys.readouterr().err.splitlines()) <= 2, name


@pytest.mark.parametrize("name", ["dataset_path", "eval_dataset_path", "resume_from_checkpoint", "output_dir"])
@pytest.mark.parametrize("given", [["--{}", ""], ["--{}="]])
def test_an_empty_option_is_named(capsys: Any, name: str, given: list[str]) -> None:
    """As of a variable of the shell that is not set: it would train on the present folder, without tests, or anew."""
    with pytest.raises(SystemExit) as stopped:
        finetune.main([*options(Path("m"), Path("d"), Path("o")), *(part.format(name) for part in given)])
    assert stopped.value.code == 2
    assert f"--{name} is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"report_to": "wandb"}, "wandb"),
        ({"optim": "galore_adamw"}, "galore"),
        ({"dataloader_prefetch_factor": 2}, "prefetch"),  # without a worker
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
    ],
    ids=str,
)
def test_what_an_option_asks_for_in_vain_is_one_line(
    qwen2: Path, data: Path, tmp_path: Path, capsys: Any, extra: dict[str, Any], said: str
) -> None:
    """transformers notices it after the model is loaded, with an error of its own or of another library."""
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=1, **extra))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("started", "joined", "zero", "kind", "message"),
    [
        (2, 1, None, "NO", "2 processes were started, but they find no GPUs; --use_cpu"),
        (1, 1, "zero2.json", "NO", "--deepspeed zero2.json needs GPUs, and torchrun"),
        (2, 2, "zero3.json", "MULTI_CPU", "--deepspeed zero3.json needs GPUs"),
        (2, 2, "zero3.json", "DEEPSPEED", None),
        (2, 2, None, "MULTI_CPU", None),
        (1, 1, None, "NO", None),
    ],
)
def test_processes_that_would_not_share_a_model_are_refused(
    started: int, joined: int, zero: str | None, kind: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train the whole model and write to one folder, or all would do without the ZeRO that was asked for."""
    monkeypatch.setenv("WORLD_SIZE", str(started))
    monkeypatch.setenv("LOCAL_RANK", "0")
    state = SimpleNamespace(distributed_type=DistributedType[kind])
    training = SimpleNamespace(world_size=joined, deepspeed=zero, distributed_state=state)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        finetune.check_processes(training)


def test_a_library_that_an_option_lacks_is_named(
    qwen2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = importlib.metadata.version

    def without_deepspeed(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_deepspeed)
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", deepspeed=SCRIPTS / "configs" / "zero2.json"))
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(said) == 1 and "deepspeed" in said[0]


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp.yaml"])
def test_accelerate_reads_the_configs(name: str) -> None:
    config = load_config_from_file(str(SCRIPTS / "configs" / name))
    assert config.num_processes == 2
    assert config.mixed_precision == "bf16"
