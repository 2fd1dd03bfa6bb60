# SPDX-License-Identifier: Apache-2.0
"""Gluon, the language within Triton that names layouts, copies and barriers: what the kernels for Hopper (H100, H200) use.

It has no interpreter, and its names may change with every Triton. With a version that is not listed here, `usable` is False
and other kernels do the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastdllm.kernels.linear.reference import FP8

VERSIONS = ("3.6", "3.7")  # of Triton, with which every kernel has been compiled

try:
    import triton

    if ".".join(triton.__version__.split(".")[:2]) not in VERSIONS:
        raise ImportError
    from triton.experimental.gluon import jit
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language import num_warps
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    GLUON = True
except ImportError:
    GLUON = False

    def jit(fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn


__all__ = [
    "GLUON",
    "copyable",
    "described",
    "fence_async_shared",
    "gl",
    "jit",
    "layout_of",
    "mbarrier",
    "num_warps",
    "tma",
    "usable",
    "wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", FP8: "float8e4nv", torch.int16: "int16"}  # Gluon's names
ALIGNED = 16  # bytes that an address and a stride of what the bulk copy engine reads are multiples of


@jit
def wait():
    """`pdl.wait` for kernels in Gluon. Launched without the attribute, both instructions are nothing."""
    gdc_launch_dependents()
    gdc_wait()


@cache
def usable(device: torch.device) -> bool:
    """Whether kernels in Gluon run on this device."""
    if not GLUON or device.type != "cuda" or torch.version.hip is not None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def copyable(x: Tensor) -> bool:
    """Whether the bulk copy engine can read tiles of x, contiguous in its last dimension."""
    *outer, last = strides(x)
    aligned = x.data_ptr() % ALIGNED == 0 and all(stride * x.itemsize % ALIGNED == 0 for stride in outer)
    return x.dtype in TYPES and x.numel() > 0 and last == 1 and aligned


def strides(x: Tensor) -> list[int]:
    """The strides of x; a dimension of one element may have any, and gets that of a contiguous one."""
    found, packed = [], 1
    for size, stride in reversed(list(zip(x.shape, x.stride(), strict=True))):
        found.append(packed if size == 1 else stride)
        packed = size * found[-1]
    return found[::-1]


@cache
def layout_of(tile: tuple[int, ...], dtype: torch.dtype) -> Any:
    """How a tile lies in shared memory, for the copy engine and the matrix unit."""
    return gl.NVMMASharedLayout.get_default_for(list(tile), getattr(gl, TYPES[dtype]))


def described(x: Tensor, tile: tuple[int, ...]) -> Any:
    """A descriptor of x, which is `copyable` and is read in tiles."""
    return TensorDescriptor(x, list(x.shape), strides(x), list(tile), layout_of(tile, x.dtype))
