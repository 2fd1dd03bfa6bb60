# SPDX-License-Identifier: Apache-2.0
"""How the tests run the fine-tuning script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "v2" / "train_scripts"


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


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
