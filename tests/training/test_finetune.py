# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning script end to end on a tiny Qwen2: resume, LoRA, several processes, the Alpaca script, bad input."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import fastdllm
from fastdllm import cli
from fastdllm.forward import Window
from fastdllm.training.checkpoint import checkpoint_to_resume, load_for_training
from fastdllm.training.finite import FiniteTrainer
from fastdllm.training.trainer import BlockDiffusionTrainer
from tests.training.conftest import tiny_qwen2
from v2.train_scripts import finetune

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "v2" / "train_scripts"
INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}
ANSWERS = {"red": "roses are", "blue": "the sea is", "green": "grass, of course", "grey": "an elephant"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca.json"
    records = [{"instruction": f"Say {n}.", "output": "one " * n} for n in range(1, 13)]
    path.write_text(json.dumps(records))
    return path


def options(model: Path, data: Path, output: Path, **extra: object) -> list[str]:
    defaults = {
        "model_name_or_path": model,
        "dataset_path": data,
        "output_dir": output,
        "bd_size": 8,
        "context_length": 128,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return [part for name, value in (defaults | extra).items() for part in (f"--{name}", str(value))]


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def launch(command: list[object], **environment: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {name: str(value) for name, value in environment.items()}
    done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def alpaca_command(folder: Path, script: Path, *extra: object, **environment: object) -> list[str]:
    """The program and the arguments that finetune_alpaca.sh would start python with, run in `folder`."""
    stub, noted = folder / "bin" / "python", folder / "command"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$COMMAND"\n')
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    launch(["bash", script, *extra], GPUS=0, PATH=path, COMMAND=noted, **environment)
    return noted.read_text().splitlines()


def test_resumed_run_repeats_the_uninterrupted_one(qwen2: Path, data: Path, tmp_path: Path) -> None:
    """Across an epoch boundary, with accumulation: the same rows, the same noise, the same weights."""
    common = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finetune.main(options(qwen2, data, whole, **common, save_strategy="steps", save_steps=4))
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    finetune.main(options(qwen2, data, resumed, **common, resume_from_checkpoint="latest"))
    assert len(losses(whole)) == 6
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 6
    weights = load_file(whole / "model.safetensors")
    for name, tensor in load_file(resumed / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    assert losses(whole)[-1] < losses(whole)[0]


@pytest.fixture
def one_batch_losses(qwen2: Path, data: Path, tmp_path: Path) -> list[float]:
    """Three steps of four rows in one process, without accumulation."""
    finetune.main(options(qwen2, data, tmp_path / "one", max_steps=3, per_device_train_batch_size=4))
    return losses(tmp_path / "one")


def test_accumulation_does_not_change_the_loss(
    qwen2: Path, data: Path, tmp_path: Path, one_batch_losses: list[float]
) -> None:
    extra = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    finetune.main(options(qwen2, data, tmp_path / "out", **extra))
    assert losses(tmp_path / "out") == pytest.approx(one_batch_losses, rel=1e-4)


@pytest.mark.slow
def test_two_processes_do_not_change_the_loss(
    qwen2: Path, data: Path, tmp_path: Path, one_batch_losses: list[float]
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone"]
    argv = options(qwen2, data, tmp_path / "out", max_steps=3, per_device_train_batch_size=2)
    launch([*torchrun, SCRIPTS / "finetune.py", *argv], ACCELERATE_USE_CPU="true")
    assert losses(tmp_path / "out") == pytest.approx(one_batch_losses, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_lora_trains_adapters_only_and_merges(qwen2: Path, data: Path, tmp_path: Path, checkpointing: bool) -> None:
    output = tmp_path / "lora"
    extra = {"lora": True, "lora_rank": 4, "merge_lora": True, "gradient_checkpointing": checkpointing}
    finetune.main(options(qwen2, data, output, max_steps=4, per_device_train_batch_size=12, **extra))
    assert losses(output)[-1] < losses(output)[0]
    adapters = load_file(output / "adapter_model.safetensors")
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(qwen2)
    assert json.loads((output / "config.json").read_text())["bd_size"] == 8
    with pytest.raises(ValueError, match=f"a LoRA adapter of {qwen2}"):
        load_for_training(str(output))
    assert adapters
    assert all("lora_" in name for name in adapters)

    base, merged = load_file(qwen2 / "model.safetensors"), load_file(output / "merged" / "model.safetensors")
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}

    with_adapters = PeftModel.from_pretrained(load_for_training(str(qwen2))[0], output).eval()
    ids = torch.randint(3, 259, (2, 9))
    loaded, _ = load_for_training(str(output / "merged"))
    torch.testing.assert_close(loaded.eval()(ids).logits, with_adapters(ids).logits, atol=1e-4, rtol=1e-4)
    assert fastdllm.load(str(output / "merged"), device="cpu").spec.mask_id == 259


@pytest.mark.parametrize("diffuses", [True, False], ids=["Fast-dLLM v2", "plain Qwen2"])
def test_the_alpaca_scripts_adapter_loads_beside_its_model(qwen2: Path, data: Path, tmp_path: Path, diffuses: bool) -> None:
    """A plain Qwen2 is no diffusion model: what it was made into is written next to the adapter."""
    base, output = qwen2, tmp_path / "out"
    if diffuses:
        base = tmp_path / "base"
        model, tokenizer = load_for_training(str(qwen2), block=8)
        for part in (model, tokenizer):
            part.save_pretrained(base)
    extra = ["--max_steps", 3, "--bd_size", 8, "--learning_rate", "5e-3", "--lora", "--lora_rank", 4, "--merge_lora"]
    extra += ["--report_to", "none"]
    command = alpaca_command(tmp_path, SCRIPTS / "finetune_alpaca.sh", *extra, MODEL=base, DATA=data, OUTPUT=output)
    finetune.main(command[1:])
    ours = fastdllm.load(str(base), device="cpu", adapter=output)
    theirs = fastdllm.load(str(output / "merged"), device="cpu")
    assert ours.spec == theirs.spec and ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    ids = torch.randint(3, 259, (1, 16))
    at = torch.arange(16)[None]
    window = Window(torch.zeros(1, dtype=torch.long), at, torch.full_like(at, 16), 16, True)
    logits = [m.network.head(m.network(ids, window, m.network.new_store(1, 16))) for m in (ours, theirs)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    if diffuses:
        untrained = fastdllm.load(str(base), device="cpu")
        assert untrained.fingerprint() != ours.fingerprint()
    with pytest.raises(FileNotFoundError, match=rf"holds a LoRA adapter, not a model; load its base model \({base}\)"):
        fastdllm.load(str(output), device="cpu")


def test_four_samples_are_learnt_by_heart_and_decoded(tmp_path: Path) -> None:
    """Training, saving, loading and decoding agree on masks, shift, blocks and the end of an answer."""
    data, output = tmp_path / "four.jsonl", tmp_path / "out"
    questions = [[{"role": "user", "content": question}] for question in ANSWERS]
    talks = [[*q, {"role": "assistant", "content": a}] for q, a in zip(questions, ANSWERS.values(), strict=True)]
    data.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    extra = {"max_steps": 200, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "logging_steps": 50}
    start = tiny_qwen2(tmp_path / "model")
    finetune.main(options(start, data, output, per_device_train_batch_size=4, **extra))
    assert losses(output)[-1] < 0.02

    model = fastdllm.load(str(output), device="cpu")
    prompts = [
        model.tokenizer.apply_chat_template(q, add_generation_prompt=True, return_dict=True)["input_ids"] for q in questions
    ]
    answers = fastdllm.generate(model, [torch.tensor(p) for p in prompts], gen_length=40).sequences
    decoded = [model.tokenizer.decode(row[len(p) :]) for row, p in zip(answers, prompts, strict=True)]
    assert decoded == [f"{answer}<|im_end|>" for answer in ANSWERS.values()]


def test_evaluation_noise_does_not_move(qwen2: Path, data: Path, tmp_path: Path) -> None:
    extra = {"eval_dataset_path": data, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0}
    finetune.main(options(qwen2, data, tmp_path / "out", max_steps=2, **extra))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    first, second = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert first == second


def test_alpaca_script_runs_offline(qwen2: Path, data: Path, tmp_path: Path) -> None:
    command = ["bash", SCRIPTS / "finetune_alpaca.sh", "--max_steps", 3, "--bd_size", 8, "--learning_rate", "5e-3"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = tmp_path / "out"
    launch([*command, "--disable_tqdm", "true"], MODEL=qwen2, DATA=data, OUTPUT=output, GPUS=0, PATH=path)
    assert losses(output)[2] < losses(output)[0]
    assert list(output.glob("runs/**/events.out.tfevents*")), "nothing was logged to TensorBoard"
    assert json.loads((output / "config.json").read_text())["model_type"] == "Fast_dLLM_Qwen"


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


def test_bad_records_are_skipped_or_fatal(
    qwen2: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(data.read_text())
    data.write_text(json.dumps([records[0], {"text": "no conversation"}, *records[1:]]))
    finetune.main(options(qwen2, data, tmp_path / "out", max_steps=1))
    errors = capsys.readouterr().err
    assert "alpaca.json[1]" in errors
    assert "12 samples in 12 rows" in errors
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "another", max_steps=1, on_bad_record="error"))
    assert stopped.value.code == 2
    assert "alpaca.json[1]" in capsys.readouterr().err.strip().splitlines()[-1]


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
    ],
    ids=["unknown", "value", "needs lora", "abbreviation", "near", "replaced", "replaced by this script", "published"],
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


@pytest.mark.parametrize(("pad_with", "fill", "label"), [("mask", 259, -100), ("end", 2, 2), ("none", None, None)])
def test_last_block_is_filled_as_asked(qwen2: Path, data: Path, pad_with: str, fill: int | None, label: int | None) -> None:
    _, tokenizer = load_for_training(str(qwen2))
    chosen = finetune.DataArguments(str(data), context_length=512, pad_with=pad_with)
    filled = [row[0] for row in finetune.load_samples(str(data), tokenizer, chosen, 32, quiet=True)]
    chosen.pad_with = "none"
    plain = [row[0] for row in finetune.load_samples(str(data), tokenizer, chosen, 32, quiet=True)]
    assert any(len(sample.ids) % 32 for sample in plain)
    for one, other in zip(filled, plain, strict=True):
        size = len(other.ids)
        assert np.array_equal(one.ids[:size], other.ids)
        assert len(one.ids) == (size if fill is None else -(-size // 32) * 32)
        assert (one.ids[size:] == fill).all()
        assert (one.labels[size:] == label).all()


def test_context_must_hold_whole_blocks(qwen2: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune.main(options(qwen2, data, tmp_path, context_length=100))
    assert re.search(r"^finetune: context_length=100 .* bd_size=8$", capsys.readouterr().err, re.MULTILINE)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.each_choice
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("harm", [truncate, Path.unlink], ids=["torn", "missing"])
def test_a_torn_checkpoint_is_passed_over(
    qwen2: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, harm: Callable[[Path], None]
) -> None:
    if harm is Path.unlink and name in ("optimizer.pt", "scheduler.pt"):
        pytest.skip("a run that saves only its weights has none")
    extra = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    finetune.main(options(qwen2, data, tmp_path, **extra))
    harm(tmp_path / "checkpoint-2" / name)
    assert checkpoint_to_resume("latest", tmp_path)[0].name == "checkpoint-1"
    capsys.readouterr()
    finetune.main(options(qwen2, data, tmp_path, **extra, resume_from_checkpoint="latest"))
    errors = capsys.readouterr().err
    reason = "there are no weights" if harm is Path.unlink and name == "model.safetensors" else name
    assert re.search(rf"checkpoint-2: passed over, .*{re.escape(reason)}", errors)
    assert f"resuming from {tmp_path / 'checkpoint-1'}" in errors
    assert checkpoint_to_resume("latest", tmp_path) == (tmp_path / "checkpoint-2", [])


def spoil(kind: str, at: int, rank: int = 0) -> Callable[..., torch.Tensor]:
    """`compute_loss` that has a NaN, or one in its gradient alone, in the first micro-batch of step `at` on one process."""
    sound, done = BlockDiffusionTrainer.compute_loss, []

    def compute_loss(self: BlockDiffusionTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = sound(self, model, *args, **kwargs)
        if not model.training or self.state.global_step != at - 1 or self.args.process_index != rank or done:
            return loss
        done.append(at)
        nothing = next(p for p in model.parameters() if p.requires_grad).flatten()[:1].sum() * 0
        return loss * float("nan") if kind == "loss" else loss + nothing.sqrt()  # its slope at 0 is infinite

    return compute_loss


def check_that_it_stopped(stopped: int | str | None, errors: str, output: Path, step: int, good: str | None) -> None:
    assert stopped == 2
    line = errors.splitlines()[-1]
    assert line.startswith(f"finetune: the loss or its gradient is no finite number at step {step} of 5;"), errors[-2000:]
    assert (f"the last checkpoint before it is {output / good}," if good else "no checkpoint was saved") in line
    assert "Traceback" not in errors
    assert {path.name for path in output.glob("*") if path.name.startswith("checkpoint")} == ({good} if good else set())
    assert not list(output.glob("*.safetensors"))
    for path in output.glob("*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.each_choice
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize(
    "extra",
    [
        {"save_strategy": "steps", "save_steps": 2},
        {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "logging_strategy": "no"},
        {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0, "logging_steps": 3, "lora": True},
        {"save_strategy": "no", "logging_strategy": "no"},
    ],
    ids=["plain", "accumulated", "adapter, unclipped", "neither logged nor saved"],
)
def test_a_loss_that_is_no_number_ends_the_run(
    qwen2: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, kind: str, at: int, extra: dict[str, Any]
) -> None:
    """It went on to the end, and saved a model that nothing can load."""
    monkeypatch.setattr(BlockDiffusionTrainer, "compute_loss", spoil(kind, at))
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=5, **extra))
    good = {3: "checkpoint-2", 5: "checkpoint-4"}.get(at) if extra["save_strategy"] != "no" else None
    output = tmp_path / "out"
    if good == "checkpoint-4":
        assert (output / "checkpoint-2").is_dir()
        shutil.rmtree(output / "checkpoint-2")
    check_that_it_stopped(stopped.value.code, capsys.readouterr().err, output, at, good)


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


def with_scaler(monkeypatch: pytest.MonkeyPatch, scale: float, factor: float = 0.5) -> None:
    """A Trainer whose losses are scaled as those of fp16 are, whoever asked for it; transformers has that on GPUs only."""
    create = BlockDiffusionTrainer.create_accelerator_and_postprocess

    def create_scaled(self: BlockDiffusionTrainer) -> None:
        create(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=factor)

    monkeypatch.setattr(BlockDiffusionTrainer, "create_accelerator_and_postprocess", create_scaled)


def test_steps_that_a_scaler_leaves_out_do_not_end_the_run(
    qwen2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first scales are too large by design, and each step under them has infinite gradients."""
    with_scaler(monkeypatch, 2.0**127, 2.0**-40)
    extra = {"max_grad_norm": 0, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    finetune.main(options(qwen2, data, tmp_path / "out", max_steps=8, **extra))
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    sound = [np.isfinite(entry["grad_norm"]) for entry in history if "grad_norm" in entry]
    assert (not sound[0] and all(sound[3:])) if sound else transformers.__version__.startswith("4."), (
        "transformers 4 logs no unclipped norm"
    )
    before, after = load_file(qwen2 / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_steps_that_are_all_left_out_end_the_run(
    qwen2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is never a number: every step is left out, and the model that was saved had learnt nothing."""
    sound = BlockDiffusionTrainer.compute_loss
    monkeypatch.setattr(BlockDiffusionTrainer, "compute_loss", lambda *a, **k: sound(*a, **k) * float("nan"))
    with_scaler(monkeypatch, 2.0**16)
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=60, logging_steps=7))
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and not list((tmp_path / "out").glob("*.safetensors"))
    assert line.startswith(
        "finetune: 42 steps in a row had gradients that overflow fp16, the last of them step 42 of 60; no checkpoint"
    )
    with pytest.warns(UserWarning, match=r"every step \(3\) was left out"):
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=3))


@pytest.mark.parametrize("when", ["checkpoint", "end"])
def test_a_disk_that_fills_while_a_model_is_saved_is_one_line(
    qwen2: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    """safetensors and torch have errors of their own for it, and the user saw the trace of one."""

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(BlockDiffusionTrainer, "_save", full)
    monkeypatch.setattr(cli, "_forget_output", lambda: None)
    strategy = {"save_strategy": "steps", "save_steps": 1} if when == "checkpoint" else {"save_strategy": "no"}
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=1, **strategy))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    assert error.splitlines()[-1] == "finetune: No space left on device"


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
    "names", [["model.safetensors"], ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]]
)
@pytest.mark.parametrize("killed", [False, True])
def test_a_saved_model_is_whole_and_alone(
    names: list[str], killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a part of it beside the weights of an earlier session, which would be read with it or in its place."""
    before = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.safetensors", "notes.txt"}
    for name in before:
        (tmp_path / name).write_text("before")

    def save(self: Any, folder: str, state_dict: Any = None) -> None:
        for name in names:
            Path(folder, name).write_text("after")
        if killed:
            raise KeyboardInterrupt

    monkeypatch.setattr(transformers.Trainer, "_save", save)
    trainer = FiniteTrainer.__new__(FiniteTrainer)
    with suppress(KeyboardInterrupt):
        FiniteTrainer._save(trainer, str(tmp_path))
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == (dict.fromkeys(before, "before") if killed else {**dict.fromkeys(names, "after"), "notes.txt": "before"})


def test_weights_that_overflow_in_the_last_step_are_not_saved(qwen2: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    extra = {"max_steps": 1, "learning_rate": 1e30, "max_grad_norm": 0, "warmup_share": 0, "weight_decay": 1e30}
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", **extra))
    assert stopped.value.code == 2
    assert "weights are no finite numbers after step 1 of 1" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_one_process_of_two_stops_both(qwen2: Path, data: Path, tmp_path: Path, kind: str, way: str) -> None:
    program = tmp_path / "program.py"
    sharded = "import tests.training.fsdp_on_cpu\n" if way == "fsdp" else ""
    program.write_text(
        f"{sharded}import sys\nfrom tests.training.test_finetune import BlockDiffusionTrainer, finetune, spoil\n"
        f"BlockDiffusionTrainer.compute_loss = spoil({kind!r}, 3, rank=1)\nfinetune.main(sys.argv[1:])\n"
    )
    extra = {"max_steps": 5, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    command = [*TWO, program, *options(qwen2, data, tmp_path / "out", **extra)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("finetune:")]
    assert len(told) == 1, done.stderr[-3000:]
    assert "at step 3 of 5; the last checkpoint before it is" in told[0] and "checkpoint-2," in told[0]
    assert not (tmp_path / "out" / "checkpoint-4").exists() and not list((tmp_path / "out").glob("*.safetensors"))


@pytest.fixture(scope="module", params=["full", "lora"])
def checkpoint(request: pytest.FixtureRequest, qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one step."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "data.json").write_text(json.dumps([{"instruction": "Say 1.", "output": "one"}] * 8))
    more = {"lora": True, "lora_rank": 4} if request.param == "lora" else {}
    extra = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1} | more
    finetune.main(options(qwen2, folder / "data.json", folder / "out", **extra))
    return folder / "out" / "checkpoint-1"


@pytest.fixture(scope="module")
def models(qwen2: Path) -> dict[bool, torch.nn.Module]:
    """The model that each checkpoint is of, by whether it is an adapter's."""
    full, _ = load_for_training(str(qwen2), 8)
    base, _ = load_for_training(str(qwen2), 8)
    arguments = finetune.ModelArguments(str(qwen2), lora=True, lora_rank=4)
    return {False: full, True: get_peft_model(base, finetune.lora_config(arguments))}


def change_json(name: str, **fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))

    return change


def write_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def save_object(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / name)


def change_weights(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    """`change` gets the tensors and the name of one of them."""

    def harm(folder: Path) -> None:
        (path,) = folder.glob("*model.safetensors")
        tensors = load_file(path)
        change(tensors, sorted(tensors)[len(tensors) // 2])
        save_file(tensors, path, metadata={"format": "pt"})

    return harm


def renamed(tensors: dict[str, torch.Tensor], name: str) -> None:
    for key in list(tensors):
        tensors[f"other.{key}"] = tensors.pop(key)


def flip(name: str) -> Callable[[Path], None]:
    """Every sixteenth byte of the file's beginning, where its parts say what they are."""

    def harm(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        for at in range(0, min(len(data), 4096), 16):
            data[at] ^= 255
        (folder / name).write_bytes(data)

    return harm


OTHER = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]).state_dict()
STATE = "trainer_state.json"
HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "state is a list": (write_text(STATE, "[]"), "is no state of a Trainer"),
    "state is a text": (write_text(STATE, '"x"'), "is no state of a Trainer"),
    "state is empty": (write_text(STATE, "{}"), "global_step"),
    "state is nested": (write_text(STATE, "[" * 100_000), "cannot be read"),
    "state of another library": (change_json(STATE, wibble=1), "is no state of a Trainer"),
    "step is a text": (change_json(STATE, global_step="1"), "global_step='1'"),
    "step is null": (change_json(STATE, global_step=None), "global_step=None"),
    "step is negative": (change_json(STATE, global_step=-5), "global_step=-5"),
    "step is another": (change_json(STATE, global_step=10**9), "global_step=1000000000"),
    "batch size is a text": (change_json(STATE, train_batch_size="x"), "train_batch_size='x'"),
    "optimizer is damaged": (flip("optimizer.pt"), "optimizer.pt"),
    "optimizer is empty": (save_object("optimizer.pt", {}), "holds no state of its kind"),
    "optimizer is a list": (save_object("optimizer.pt", [1]), "holds no state of its kind"),
    "optimizer is an object": (save_object("optimizer.pt", Path("x")), "holds no state of its kind"),
    "optimizer of another model": (save_object("optimizer.pt", OTHER), "is of another model"),
    "scheduler is a list": (save_object("scheduler.pt", [1]), "holds no state of its kind"),
    "scheduler is empty": (save_object("scheduler.pt", {}), "holds no state of its kind"),
    "random state is a list": (save_object("rng_state.pth", [1]), "holds no state of its kind"),
    "a tensor is missing": (change_weights(lambda tensors, name: tensors.pop(name)), "lacks tensors"),
    "a tensor too many": (change_weights(lambda tensors, name: tensors.update(x=torch.zeros(2))), "has unknown tensors"),
    "all names are others": (change_weights(renamed), "lacks tensors"),
    "another shape": (change_weights(lambda t, name: t.update({name: torch.zeros(3, 3)})), "has misshapen tensors"),
    "not a number": (change_weights(lambda t, name: t.update({name: t[name] * torch.nan})), "NaN or infinite"),
    "infinite": (change_weights(lambda t, name: t.update({name: t[name] / 0})), "NaN or infinite"),
    "integers": (change_weights(lambda t, name: t.update({name: t[name].int()})), "no floating-point numbers"),
    "config is a list": (write_text("config.json", "[]"), "not a JSON object"),
    "config has one name twice": (write_text("config.json", '{"a": 1, "a": 2}'), "is there twice"),
    "a folder in the place of a file": (lambda folder: (folder / STATE).unlink() or (folder / STATE).mkdir(), "there is no"),
}


@pytest.mark.parametrize("kind", HARMS)
def test_a_checkpoint_that_is_not_this_runs_is_passed_over(
    checkpoint: Path, models: dict[bool, torch.nn.Module], tmp_path: Path, kind: str
) -> None:
    """The Trainer would fail on some of these, and go on from other weights than the checkpoint's on the others."""
    model = models[(checkpoint / "adapter_config.json").is_file()]
    older, newer = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    for folder in (older, newer):
        shutil.copytree(checkpoint, folder)
    change_json(STATE, global_step=2)(newer)
    assert checkpoint_to_resume("latest", tmp_path, model) == (newer, [])
    harm, message = HARMS[kind]
    harm(newer)
    found, (line,) = checkpoint_to_resume("latest", tmp_path, model)
    assert found == older and line.startswith(f"{newer}: passed over, ") and message in line
    assert len(line.splitlines()) == 1
    with pytest.raises(ValueError, match="resume_from_checkpoint="):
        checkpoint_to_resume(str(newer), tmp_path, model)


def test_a_checkpoint_of_the_other_kind_is_passed_over(
    checkpoint: Path, models: dict[bool, torch.nn.Module], tmp_path: Path
) -> None:
    """--lora was given in the first run and not in the second, or the other way round."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    model = models[not (checkpoint / "adapter_config.json").is_file()]
    with pytest.raises(ValueError, match=r"checkpoint-1: passed over, there is no .*safetensors"):
        checkpoint_to_resume("latest", tmp_path, model)


THERE = ["checkpoint-6", "config.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json", "merged"]


@pytest.mark.parametrize("found", THERE)
@pytest.mark.parametrize("extra", [{}, {"lora": True}, {"resume_from_checkpoint": "elsewhere/checkpoint-6"}], ids=str)
def test_what_another_run_left_is_neither_lost_nor_taken_for_this_ones(
    data: Path, tmp_path: Path, capsys: Any, found: str, extra: dict[str, Any]
) -> None:
    """New weights next to an old index did not load, an adapter next to an old model was not used, and `latest` went on with
    a checkpoint of the run before."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / found).write_text("kept")
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(tmp_path / "nowhere", data, tmp_path / "out", **extra))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and f"holds {found} already" in error
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["kept"]


def test_a_model_with_an_adapter_beside_it_is_refused(qwen2: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    """transformers adds the adapter, frozen, and nothing is left to train."""
    shutil.copytree(qwen2, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(tmp_path / "model", data, tmp_path / "out"))
    assert stopped.value.code == 2 and "holds a LoRA adapter next to the model" in capsys.readouterr().err


def test_a_worker_that_is_killed_is_one_line(
    qwen2: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the system, where memory runs out."""
    monkeypatch.setattr(finetune.Collator, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=1, dataloader_num_workers=1))
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and error[-1].startswith("finetune: DataLoader worker")


@pytest.mark.parametrize("extra", [{"dataloader_drop_last": True, "max_steps": 2}, {"num_train_epochs": 0}], ids=str)
def test_a_run_without_a_step_saves_no_model(
    qwen2: Path, data: Path, tmp_path: Path, capsys: Any, extra: dict[str, Any]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", per_device_train_batch_size=100, **extra))
    assert stopped.value.code == 2 and "no step was made" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "tokenizer.json"])
def test_what_stands_in_the_way_of_a_file_is_one_line(
    qwen2: Path, data: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It was a traceback, of a kind that depends on the library which writes the file."""
    monkeypatch.setattr(finetune, "check_output", lambda *_: None)
    monkeypatch.setattr(cli, "_forget_output", lambda: None)
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=1))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error and "Is a directory" in error.splitlines()[-1]


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(qwen2: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint_to_resume("latest", tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-1: passed over, there is no trainer_state\.json"):
        checkpoint_to_resume("latest", tmp_path)
    with pytest.raises(ValueError, match="resume_from_checkpoint='nowhere'"):
        checkpoint_to_resume("nowhere", tmp_path)


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("way", ["fsdp", "zero2", "zero3"])
def test_shards_are_saved_as_what_load_reads_and_resumed(
    qwen2: Path, data: Path, tmp_path: Path, lora: bool, way: str
) -> None:
    """Two processes that hold half of every weight each: the whole model is saved, and a run continues from it."""
    if way != "fsdp" and not find_spec("deepspeed"):
        pytest.skip("needs deepspeed")
    common = {"max_steps": 3, "per_device_train_batch_size": 2} | ({"lora": True, "lora_rank": 4} if lora else {})
    one, whole, resumed = (tmp_path / name for name in ("one", "whole", "resumed"))
    finetune.main(options(qwen2, data, one, **{**common, "per_device_train_batch_size": 4}))
    extra = {"save_strategy": "steps", "save_steps": 2} | ({"merge_lora": True} if lora else {})
    program = Path(__file__).with_name("fsdp_on_cpu.py" if way == "fsdp" else "zero_on_cpu.py")
    if way != "fsdp":
        common |= {"deepspeed": SCRIPTS / "configs" / f"{way}.json", "use_cpu": False}
    launch([*TWO, program, *options(qwen2, data, whole, **common, **extra)])
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    launch([*TWO, program, *options(qwen2, data, resumed, **common, resume_from_checkpoint="latest")])
    assert (way == "fsdp") != any((whole / "checkpoint-2").glob("global_step*")), "DeepSpeed leaves a folder of its own"
    assert losses(whole) == pytest.approx(losses(one), rel=1e-3)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    first, second = load_file(whole / name), load_file(resumed / name)
    assert first.keys() == second.keys() == load_file(one / name).keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    fastdllm.load(str(whole / "merged" if lora else whole), device="cpu")


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
