# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of fine-tuning: resumed, torn, damaged, of another run, and what an output folder may hold."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import fastdllm
from fastdllm.training.checkpoint import checkpoint_to_resume, load_for_training
from fastdllm.training.finite import FiniteTrainer
from tests.training.running import SCRIPTS, TWO, launch, losses, options
from v2.train_scripts import finetune


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


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(qwen2: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint_to_resume("latest", tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-1: passed over, there is no trainer_state\.json"):
        checkpoint_to_resume("latest", tmp_path)
    with pytest.raises(ValueError, match="resume_from_checkpoint='nowhere'"):
        checkpoint_to_resume("nowhere", tmp_path)


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
