# SPDX-License-Identifier: Apache-2.0
"""The operations a forward is made of: one folder each, with `reference.py` (torch; its docstrings are the contract) and
`triton.py` with the same signatures.

CUDA tensors use Triton where it imports, everything else the reference. FASTDLLM_KERNELS=reference or =triton overrides
that for every tensor (read once, at import). Importing this package does not import Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch

from fastdllm.kernels.accept import reference as _accept
from fastdllm.kernels.attention import reference as _attention
from fastdllm.kernels.block_attention import reference as _block_attention
from fastdllm.kernels.confidence import reference as _confidence
from fastdllm.kernels.confidence.reference import Confidence
from fastdllm.kernels.discount import reference as _discount
from fastdllm.kernels.experts import reference as _experts
from fastdllm.kernels.linear import reference as _linear
from fastdllm.kernels.linear.reference import Activations, Quantized, quantize_weight
from fastdllm.kernels.partial import reference as _partial
from fastdllm.kernels.partial.reference import Picked
from fastdllm.kernels.rmsnorm import reference as _rmsnorm
from fastdllm.kernels.rope_store import reference as _rope_store
from fastdllm.kernels.silu_mul import reference as _silu_mul

_CHOICE = os.environ.get("FASTDLLM_KERNELS", "auto")
if _CHOICE not in ("auto", "reference", "triton"):
    raise ValueError(f"FASTDLLM_KERNELS={_CHOICE!r} is not one of auto, reference, triton")

Op = TypeVar("Op", bound=Callable[..., Any])


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _twin(reference: Callable[..., Any]) -> Callable[..., Any]:
    module = importlib.import_module(reference.__module__.removesuffix("reference") + "triton")
    return getattr(module, reference.__name__)


def dispatch(reference: Op, library: torch.dtype | None = None) -> Op:
    """The op that runs `reference` or its Triton twin, whichever its first argument (given by position) asks for.

    library: of this dtype, the reference is the faster one on every device.
    """

    @wraps(reference)
    def op(x: Activations, *args: Any, **kwargs: Any) -> Any:
        on_gpu = x.is_cuda and x.dtype != library and _has_triton()
        # The twins have no gradient.
        differentiable = x.requires_grad and torch.is_grad_enabled()
        use_twin = (_CHOICE == "triton" or (_CHOICE == "auto" and on_gpu)) and not differentiable
        return (_twin(reference) if use_twin else reference)(x, *args, **kwargs)

    return cast(Op, op)


rmsnorm = dispatch(_rmsnorm.rmsnorm)
linear = dispatch(_linear.linear)
linear_rmsnorm = dispatch(_rmsnorm.linear_rmsnorm)
linear_rmsnorm_fp8 = dispatch(_rmsnorm.linear_rmsnorm_fp8)
linear_silu_mul = dispatch(_silu_mul.linear_silu_mul)
linear_silu_mul_fp8 = dispatch(_silu_mul.linear_silu_mul_fp8)
experts_rmsnorm = dispatch(_experts.experts_rmsnorm)
linear_rope_store = dispatch(_rope_store.linear_rope_store)
# Triton multiplies fp32 outside the matrix unit and takes half a minute to compile it; the library has both.
attention = dispatch(_attention.attention, library=torch.float32)
attention_fp8 = dispatch(_attention.attention_fp8, library=torch.float32)
block_attention = dispatch(_block_attention.block_attention, library=torch.float32)
confidence = dispatch(_confidence.confidence)
head_confidence = dispatch(_confidence.head_confidence)
accept = dispatch(_accept.accept)
discount = dispatch(_discount.discount)
drift = dispatch(_partial.drift)
pick = dispatch(_partial.pick)
merge = dispatch(_partial.merge)

__all__ = [
    "Activations",
    "Confidence",
    "Picked",
    "Quantized",
    "accept",
    "attention",
    "attention_fp8",
    "block_attention",
    "confidence",
    "discount",
    "drift",
    "experts_rmsnorm",
    "head_confidence",
    "linear",
    "linear_rmsnorm",
    "linear_rmsnorm_fp8",
    "linear_rope_store",
    "linear_silu_mul",
    "linear_silu_mul_fp8",
    "merge",
    "pick",
    "quantize_weight",
    "rmsnorm",
]
