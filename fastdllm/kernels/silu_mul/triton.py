# SPDX-License-Identifier: Apache-2.0
"""SwiGLU: the activation in one read and one write, and over few positions together with the product before it.

A program of the joint kernel multiplies the gate's and the up projection's rows of the same channels, so that the product
never reaches memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.device import TensorDescriptor, stages
from fastdllm.kernels.linear import hopper, hopper_int4
from fastdllm.kernels.linear.int4 import PARTS, UNIT
from fastdllm.kernels.linear.reference import FP8, FP8_MAX, Activations, Quantized
from fastdllm.kernels.linear.triton import (
    SKINNY_ROWS,
    as_fp8,
    flat,
    group_of,
    is_skinny,
    linear,
    of_groups,
    quantize_rows,
    scale_of,
    streamed,
)
from fastdllm.kernels.pdl import LAUNCH, wait

BLOCK = 1024
LONGEST = 32768  # channels of a row that one program can hold


@triton.jit
def _gated(gate_up, i_n, o_f, F):
    """Channels o_f of row i_n after the activation, rounded as memory would round them; 0 beyond F."""
    p_x, m_f = gate_up + i_n * 2 * F + o_f, o_f < F
    b_gate = tl.load(p_x, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + F, mask=m_f, other=0.0).to(tl.float32)
    # Rounded before the product, as two separate torch operations do.
    b_act = (b_gate * tl.sigmoid(b_gate)).to(gate_up.dtype.element_ty).to(tl.float32)
    return (b_act * b_up).to(gate_up.dtype.element_ty)


@triton.jit
def _silu_mul_kernel(gate_up, out, F, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait()
    tl.store(out + i_n * F + o_f, _gated(gate_up, i_n, o_f, F), mask=o_f < F)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `fastdllm.kernels.silu_mul.reference.silu_mul`."""
    gate_up = gate_up.contiguous()
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], F))
    grid = (out.numel() // F, triton.cdiv(F, BLOCK))
    _silu_mul_kernel[grid](gate_up, out, F, BLOCK=BLOCK, num_warps=4, **LAUNCH)
    return out


@triton.jit
def _silu_mul_fp8_kernel(gate_up, out, scale, F, LARGEST: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """A whole row, whose largest value its scale depends on: in two tiles, whose sizes are powers of two."""
    i_n = tl.program_id(0).to(tl.int64)
    o_f, o_r = tl.arange(0, BLOCK), BLOCK + tl.arange(0, REST)
    wait()
    b_act, b_rest = _gated(gate_up, i_n, o_f, F), _gated(gate_up, i_n, o_r, F)
    b_max = tl.maximum(tl.max(tl.abs(b_act.to(tl.float32)), 0), tl.max(tl.abs(b_rest.to(tl.float32)), 0))
    b_scale, b_inverse = scale_of(b_max, LARGEST)
    tl.store(scale + i_n, b_scale)
    b_act = tl.clamp(b_act.to(tl.float32) * b_inverse, -LARGEST, LARGEST)
    b_rest = tl.clamp(b_rest.to(tl.float32) * b_inverse, -LARGEST, LARGEST)
    tl.store(out + i_n * F + o_f, b_act.to(out.dtype.element_ty), mask=o_f < F)
    tl.store(out + i_n * F + o_r, b_rest.to(out.dtype.element_ty), mask=o_r < F)


def silu_mul_fp8(gate_up: Tensor) -> Quantized:
    """`silu_mul` of gate_up [M, 2F] in fp8, with one scale a row.

    Of 1024 rows with 18944 and 12288 channels, us: 28.6 and 20.4; as one tile with 32 warps 41.6 and 27.0 (H200).
    """
    M, F = len(gate_up), gate_up.shape[1] // 2
    if F > LONGEST:
        return quantize_rows(silu_mul(gate_up))
    out = torch.empty((M, F), dtype=FP8, device=gate_up.device)
    scale = torch.empty((M,), dtype=torch.float32, device=gate_up.device)
    block = triton.next_power_of_2(F // 2 + 1)  # the largest power of two that is no more than F
    rest = triton.next_power_of_2(max(1, F - block))
    _silu_mul_fp8_kernel[(M,)](
        gate_up.contiguous(), out, scale, F, FP8_MAX, block, rest, num_warps=4 if F < 4096 else 16, **LAUNCH
    )
    return Quantized(out, scale, gate_up.dtype)


@triton.jit
def _linear_silu_mul_kernel(
    x,
    w,
    scale,
    token_scale,
    sums,
    out,
    M,
    F,
    C,
    stride_n,
    stride_g,
    stride_z,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_n = tl.program_id(0) * BLOCK_N
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, 2 * BLOCK_N)
    o_r = o_r // BLOCK_N * F + i_n + o_r % BLOCK_N  # rows of gate, then those of up
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_m = o_n < F, o_m < M
    if SCALE:
        b_scale = tl.load(scale + o_r, mask=o_r < 2 * F, other=0.0)
    wait()
    if TOKEN_SCALE:
        b_token = tl.load(token_scale + o_m, mask=m_m, other=0.0)
    b_y = streamed(
        x, w, scale, sums, i_n, o_r, o_m, 0, C, M, 2 * F, C, stride_n, stride_g, stride_z,
        GROUP, AHEAD, EVEN, True, 2 * BLOCK_N, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    if SCALE:
        b_y *= b_scale[:, None]
    if TOKEN_SCALE:
        b_y *= b_token[None, :]
    b_gate, b_up = tl.split(tl.permute(tl.reshape(b_y, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
    p_out = out + o_m.to(tl.int64)[None, :] * F + o_n[:, None]
    tl.store(p_out, b_gate * tl.sigmoid(b_gate) * b_up, mask=m_n[:, None] & m_m[None, :])


def linear_silu_mul(x: Activations, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """See `fastdllm.kernels.silu_mul.reference.linear_silu_mul`."""
    rows = flat(x)
    out = _joint(rows, weight, scale) if _fits(rows, weight, scale) else silu_mul(linear(rows, weight, scale))
    return out.view(*x.shape[:-1], -1)


def linear_silu_mul_fp8(x: Activations, weight: Tensor, scale: Tensor | None = None) -> Quantized:
    """See `fastdllm.kernels.silu_mul.reference.linear_silu_mul_fp8`."""
    rows = flat(x)
    if _fits(rows, weight, scale):
        out = quantize_rows(_joint(rows, weight, scale))
    else:
        out = silu_mul_fp8(linear(rows, weight, scale))
    return Quantized(out.values.view(*x.shape[:-1], -1), out.scale.view(x.shape[:-1]), out.dtype)


def _fits(rows: Activations, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether the joint kernel computes these rows."""
    return rows.shape[0] <= SKINNY_ROWS and is_skinny(rows, weight, scale)


def _joint(rows: Activations, weight: Tensor, scale: Tensor | None) -> Tensor:
    """rows [M, C] through the joint kernel: [M, F]."""
    if weight.dtype == FP8:
        tokens = as_fp8(rows)
        return launch(tokens.values, weight, scale, tokens.scale, tokens.dtype, **tile_of(tokens.values, weight))
    return launch(rows, weight, scale, None, rows.dtype, **tile_of(rows, weight, scale))


def tile_of(x: Tensor, w: Tensor, scale: Tensor | None = None) -> dict[str, int]:
    """Tile for x [M, C] and w [2F, ...] of the kernel that `launch` launches."""
    if scale is not None and hopper_int4.gated_applies(x, w, scale):
        return hopper_int4.gated_tiling(len(x))
    given = len(x), len(w) // 2, w.dtype
    return tiling(*given) | hopper.gated_tiling(*given) if hopper.applies(x, w) else tiling(*given)


def tiling(M: int, F: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the joint kernel for M rows and F channels, weights of `dtype`; block_n counts the rows of one half.

    Hopper now takes `linear/hopper.py` for most of these. As `scripts.benchmarks.tiles` times them on an H200 (torch 2.11,
    triton 3.6, 2026-11-30), ms of a forward, as (block_n, bytes of a weight's row, stages). v2 at 8 rows: fp8 (32, 512, 3)
    2.50, (32, 256, 4) 2.52; bf16 (32, 512, 3) 4.02, (32, 256, 4) 4.09. LLaDA at 16: fp8 (32, 256, 4) 2.76, (32, 512, 3)
    2.79; bf16 (32, 256, 4) 4.35, (32, 512, 3) 4.45. LLaDA at 32: fp8 (32, 256, 3) 2.90, (32, 256, 4) 2.96, (64, 128, 4)
    2.98; bf16, the same three, 4.51, 4.58, 4.62; int8 (32, 128, 4) 3.81, (32, 256, 3) 3.89, and int8 was measured nowhere
    else. v2 at 32: fp8 (32, 256, 2) 2.58, (32, 256, 3) 2.62; bf16 (32, 256, 3) 4.12, (32, 128, 4) 4.19. LLaDA at 64: fp8
    (64, 128, 4) 3.25, (32, 256, 3) 3.34; bf16 (32, 128, 4) 4.94, (64, 128, 4) 4.97. v2 at 64: fp8 (64, 128, 3) 3.05, (32,
    256, 3) 3.17; bf16 (64, 128, 3) 4.65, (32, 128, 4) 4.68. LLaDA in int4, as (block_n, stages): at 16 (32, 4) 2.77, (32,
    3) 2.94; at 32 (32, 3) 3.18, (64, 3) 3.21.
    """
    block_m = max(16, triton.next_power_of_2(M))
    # A tile that takes much shared memory lets fewer programs run at once, and keeps those of the next kernel waiting. A
    # shape whose programs of 64 rows fit twice on each of an H100's 132 multiprocessors can afford a stage more.
    few = F <= hopper.FEW_CHANNELS
    if dtype == torch.uint8:
        shape = (32, UNIT, 4, 4 if block_m == 16 else 3)
    elif dtype == torch.int8:
        shape = (32, 128, 4, 4)
    elif block_m == 16:
        shape = (32, 256 // dtype.itemsize, 4, 4) if few else (32, 512 // dtype.itemsize, 4, 3)
    elif block_m == 32:
        shape = (32, 256 // dtype.itemsize, 4, 2 if dtype == FP8 and not few else 3)
    else:
        shape = (64, 128 // dtype.itemsize, 4, 4 if few else 3)
    names = ("block_n", "block_c", "num_warps", "num_stages")
    return dict(zip(names, shape, strict=True)) | {"block_m": block_m}


def launch(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    token_scale: Tensor | None,
    dtype: torch.dtype,
    *,
    block_m: int,
    block_n: int,
    block_c: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """silu(first half) * second half of x [M, C] times w [2F, C] transposed, scaled by channel and token: [M, F].

    `linear/hopper.py` and `linear/hopper_int4.py` where they apply."""
    if hopper.applies(x, w):
        return hopper.gated_product(
            x, w, scale, token_scale, dtype, block_m=block_m, block_n=block_n, block_c=block_c, num_warps=num_warps,
            num_stages=num_stages,
        )  # fmt: skip
    if scale is not None and hopper_int4.gated_applies(x, w, scale):
        return hopper_int4.gated_product(
            x, w.view(torch.int16), scale, group_of(w, scale, x.shape[1]), block_m=block_m, block_n=block_n,
            block_c=block_c, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    (M, C), F = x.shape, w.shape[0] // 2
    w, sums, strides, groups = of_groups(x, w, scale)
    tile_c = block_c // PARTS if groups["GROUP"] else block_c  # elements of w that hold block_c channels
    out = torch.empty((M, F), dtype=dtype, device=x.device)
    _linear_silu_mul_kernel[(triton.cdiv(F, block_n), triton.cdiv(M, block_m))](
        x.contiguous(),
        TensorDescriptor.from_tensor(w.view(2, F, -1), [2, block_n, tile_c]),
        out if scale is None else scale,
        out if token_scale is None else token_scale,
        sums,
        out,
        M,
        F,
        C,
        *strides,
        SCALE=scale is not None and not groups["GROUP"],
        **groups,
        TOKEN_SCALE=token_scale is not None,
        EVEN=C % block_c == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
        num_stages=stages(num_stages, 2 * tile_c * block_n * w.itemsize + block_c * block_m * x.itemsize, x.device),
        **LAUNCH,
    )
    return out
