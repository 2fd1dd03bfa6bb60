# SPDX-License-Identifier: Apache-2.0
"""What ends fine-tuning early: numbers that are not finite, a full disk, a killed worker. What is saved stays good."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastdllm import shell
from fastdllm.training.trainer import BlockDiffusionTrainer
from tests.training.running import ROOT, TWO, options
from v2.train_scripts import finetune


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
    monkeypatch.setattr(shell, "_forget_output", lambda: None)
    strategy = {"save_strategy": "steps", "save_steps": 1} if when == "checkpoint" else {"save_strategy": "no"}
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=1, **strategy))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    assert error.splitlines()[-1] == "finetune: No space left on device"


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
        f"{sharded}import sys\nfrom tests.training.test_finetune_stops import BlockDiffusionTrainer, finetune, spoil\n"
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
    monkeypatch.setattr(shell, "_forget_output", lambda: None)
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        finetune.main(options(qwen2, data, tmp_path / "out", max_steps=1))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error and "Is a directory" in error.splitlines()[-1]
