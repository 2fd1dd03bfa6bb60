# SPDX-License-Identifier: Apache-2.0
"""How many positions a server may hold at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastdllm.models import Model

GPU_SHARE = 0.75  # of the memory that is free once the model is loaded; the rest is for activations and graphs
CPU_SHARE = 0.25


def bytes_per_position(model: Model) -> int:
    """Keys and values of all layers, and the canvas."""
    spec = model.spec
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * model.dtype.itemsize + 64


def positions_that_fit(model: Model, rows: int) -> int:
    """As many as free memory allows, at most what `rows` requests of the model's whole context take."""
    on_gpu = model.device.type == "cuda"
    free = GPU_SHARE * torch.cuda.mem_get_info(model.device)[0] if on_gpu else CPU_SHARE * _available()
    return max(1, min(int(free / bytes_per_position(model)), rows * (model.spec.max_length + 256)))


def _available() -> float:
    """Bytes of main memory that can be had without swapping; 4 GiB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4.0 * 2**30
