# SPDX-License-Identifier: Apache-2.0
"""How many positions a run may hold at once (the server's budget, and that of `generate` without a batch_size), and how many
of prompts it may keep for later ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastdllm import prompt_cache

if TYPE_CHECKING:
    from fastdllm.models import Model

GPU_SHARE = 0.75  # of the memory that is free once the model is loaded; the rest is for activations and graphs
CPU_SHARE = 0.25
PROMPT_SHARE = 0.2  # of what a run's canvas has left over


def bytes_per_position(model: Model) -> int:
    """Keys and values of all layers, and the canvas."""
    spec = model.spec
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * model.dtype.itemsize + 64


def positions_that_fit(model: Model, rows: int) -> int:
    """As many as free memory allows, at most what `rows` requests of the model's whole context take."""
    share, free = (GPU_SHARE, _free_on_gpu(model.device)) if model.device.type == "cuda" else (CPU_SHARE, _available())
    return max(1, min(int(share * free / bytes_per_position(model)), rows * (model.spec.max_length + 256)))


def prompt_positions(model: Model) -> int:
    """How many positions of prompts are kept unless the caller says otherwise."""
    free = _free_on_gpu(model.device) if model.device.type == "cuda" else _available()
    return max(1, min(int(PROMPT_SHARE * free / bytes_per_position(model)), prompt_cache.POSITIONS))


def _free_on_gpu(device: torch.device) -> float:
    """Bytes that nobody has, and those that torch keeps for its next tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + kept)


def _available() -> float:
    """Bytes of main memory that can be had without swapping; 4 GiB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4.0 * 2**30
