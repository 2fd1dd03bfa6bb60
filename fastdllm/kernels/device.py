# SPDX-License-Identifier: Apache-2.0
"""What launches need to know of the device. The interpreter, on a CPU, is taken for an H100."""

from __future__ import annotations

from functools import cache

import torch

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4 has none: the library multiplies
    TensorDescriptor = None

RESERVED = 1024  # bytes of a multiprocessor's shared memory that the driver keeps per program
SCRATCH = 16384  # bytes of shared memory kept free of prefetched tiles: for a product's other operand and for reductions


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 232448
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - RESERVED


@cache
def cache_size(device: torch.device) -> int:
    """Bytes of the L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 50 * 2**20


@cache
def reads_shared(device: torch.device) -> bool:
    """Whether the matrix unit reads its right operand from shared memory (Hopper); elsewhere that takes registers."""
    return device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9)


def stages(wanted: int, tile_bytes: int, device: torch.device, kept: int = SCRATCH) -> int:
    """Tiles of `tile_bytes` on their way at a time: `wanted`, or as many as the device has room for beside `kept` bytes. At
    least two: a kernel that still does not fit says so."""
    return max(2, min(wanted, (shared_memory(device) - kept) // tile_bytes))
