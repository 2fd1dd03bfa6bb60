# SPDX-License-Identifier: Apache-2.0
"""Launch the Hopper kernels without a GPU, as far as their arguments: in a process of its own, like `hopper_ptx.py`."""

from __future__ import annotations

import json
import os
from collections import Counter
from types import ModuleType
from typing import Any

LAUNCHED: Counter[str] = Counter()
OPTIONS = ("num_warps", "num_stages", "launch_pdl")  # of a launch, which are no arguments


class Bound:
    """In place of a kernel: every argument must be given, and given once."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self.name = f"{module.__name__.removeprefix('fastdllm.kernels.')}.{name}"
        self.arguments = getattr(module, name).arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = [*self.arguments[: len(args)], *(name for name in kwargs if name not in OPTIONS)]
            assert len(args) <= len(self.arguments) and sorted(given) == sorted(self.arguments), (self.name, given)
            assert all(size > 0 for size in grid), (self.name, grid)
            LAUNCHED[self.name] += 1

        return launch


def main() -> None:
    """Print how often each kernel was launched, as JSON."""
    os.environ["TRITON_INTERPRET"] = "0"
    import torch

    from fastdllm.kernels.attention import hopper as attention_hopper
    from fastdllm.kernels.attention import hopper_wide
    from fastdllm.kernels.attention import triton as attention
    from fastdllm.kernels.linear import hopper, hopper_int4, triton
    from fastdllm.kernels.linear.reference import quantize_weight
    from fastdllm.kernels.rmsnorm import triton as rmsnorm
    from fastdllm.kernels.silu_mul import triton as silu_mul

    for module in (attention_hopper, hopper_wide, hopper, hopper_int4, triton, silu_mul, rmsnorm):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Bound(module, name))
    for module in (attention_hopper, hopper, hopper_int4):
        module.usable = lambda device: True  # type: ignore[attr-defined]
    half = {"dtype": torch.bfloat16}
    for M in (1, 8, 32, 64):
        x, residual, norm = torch.randn(M, 512, **half), torch.randn(M, 1024, **half), torch.ones(1024, **half)
        for kind in ("bf16", "fp8", "int8", "int4"):
            w, scale = torch.randn(1024, 512, **half), None
            if kind != "bf16":
                w, scale = quantize_weight(w, kind)
            for bias in (None, norm):
                assert triton.linear(x, w, scale, bias).shape == (M, 1024)
            assert silu_mul.linear_silu_mul(x, w, scale).shape == (M, 512)
            rmsnorm.linear_rmsnorm(x, w, norm, 1e-6, residual, scale)
            if kind == "fp8":
                silu_mul.linear_silu_mul_fp8(x, w, scale)
    view = torch.randn(5, 4104, **half)[:, :4100]  # its rows are aligned, those of a copy are not
    triton.linear(view, *quantize_weight(torch.randn(64, 4100, **half), "int4"))
    for W, H, K, T in ((8, 28, 4, 160), (32, 32, 32, 1256), (1, 8, 8, 4000), (3, 64, 8, 4096), (1256, 28, 4, 1256)):
        q, store = torch.randn(1, W, H, 128, **half), torch.randn(2, K, T, 128, **half)
        row, limit = torch.tensor([1]), torch.full((1, W), T)
        for hide in (None, torch.zeros(1, 2, dtype=torch.long)):
            assert attention.attention(q, store, store, row, limit, T, hide).shape == q.shape
            assert attention.attention_fp8(q, store, store, row, limit, T, hide).values.shape == (1, W, H * 128)
    print(json.dumps(LAUNCHED))
