# SPDX-License-Identifier: Apache-2.0
"""Linear layers on a GPU.

A few rows (a block of one or two sequences) are bound by reading the weight: one kernel streams it through the left operand
of the matrix unit, widening int8 in registers, and several programs share the channels of a narrow one. The bulk copy engine
fetches the tiles; plain asynchronous copies were up to a fifth slower, and prefetching weights into the L2 cache before the
kernel's turn gained nothing. Fetching them into shared memory by then does gain, and `hopper.py` does so on Hopper. Many
rows are bound by arithmetic and belong to the library, with x quantised per token for fp8 weights; `fp8.py` is for those
between.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.device import TensorDescriptor, reads_shared, stages
from fastdllm.kernels.dot import dot
from fastdllm.kernels.linear import fp8, hopper, hopper_int4, reference
from fastdllm.kernels.linear.int4 import HALF, PARTS, UNIT, group_size
from fastdllm.kernels.linear.nibbles import unit_product, unit_steps, unit_sums
from fastdllm.kernels.linear.reference import FP8, FP8_MAX, TINY, Activations, Quantized
from fastdllm.kernels.pdl import LAUNCH, wait

# Most rows of the skinny kernel; more go to the library, from where on int8 costs a widened copy of the weight.
SKINNY_ROWS = 64
WIDENED_ROWS = 256
WIDEN_BLOCK = 4096  # channels of one output row that a program widens
FEW_ROWS = 64  # of long rows as many are quantised whole; of more, several share a multiprocessor, in pieces
SUMS = 8  # halves of a unit that a program adds up
_TINY = tl.constexpr(TINY)


@triton.jit
def load_rows(x, o_m, M, c, C, EVEN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels [c, c + BLOCK_C) of rows o_m of x [M, C], as [BLOCK_C, BLOCK_M]; rows past the end repeat the last one."""
    o_c = c + tl.arange(0, BLOCK_C)
    p_x = x + tl.minimum(o_m, M - 1).to(tl.int64)[:, None] * C + o_c[None, :]
    if EVEN:
        return tl.trans(tl.load(p_x))
    return tl.trans(tl.load(p_x, mask=(o_c < C)[None, :], other=0.0))


@triton.jit
def load_quarters(x, o_m, M, c, C, EVEN: tl.constexpr, BLOCK_C: tl.constexpr):
    """`load_rows` in four tiles of a quarter of the channels each."""
    QUARTER: tl.constexpr = BLOCK_C // 4
    x_1 = load_rows(x, o_m, M, c, C, EVEN, QUARTER)
    x_2 = load_rows(x, o_m, M, c + QUARTER, C, EVEN, QUARTER)
    x_3 = load_rows(x, o_m, M, c + 2 * QUARTER, C, EVEN, QUARTER)
    x_4 = load_rows(x, o_m, M, c + 3 * QUARTER, C, EVEN, QUARTER)
    return x_1, x_2, x_3, x_4


@triton.jit
def streamed(
    x,
    w,
    scale,
    sums,
    i_n,
    o_n,
    o_m,
    start,
    stop,
    M,
    N,
    C,
    stride_n,
    stride_g,
    stride_z,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    EVEN: tl.constexpr,
    JOINT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Rows o_n of w times rows o_m of x [M, C] over the channels from start to stop: [ROWS, BLOCK_M], with steps and zeros
    applied (GROUP), other scales not.

    w: a descriptor of the weights [N, C], or of their words with GROUP; with JOINT it has the shape [2, N / 2, ...], and a
        tile holds the rows from i_n on of both halves.
    scale, sums: see `nibbles.py`. AHEAD: whether they are loaded a unit before their use.
    """
    # The weight is the left operand: its many rows fill the matrix unit, and it can be widened in registers.
    b_y = tl.zeros((ROWS, BLOCK_M), dtype=tl.float32)
    if GROUP == 0:
        for c in range(start, stop, BLOCK_C):
            b_w = tl.reshape(w.load([0, i_n, c]), (ROWS, BLOCK_C)) if JOINT else w.load([i_n, c])
            b_y = dot(b_w, load_rows(x, o_m, M, c, C, EVEN, BLOCK_C), b_y)
    else:
        if AHEAD:  # these loads are small and late: their latency shows where nothing hides it
            s_1, z_1, s_2, z_2 = unit_steps(scale, o_n, N, start, C, GROUP, stride_n, stride_g, stride_z)
            t_1, t_2 = unit_sums(sums, o_m, M, start, C)
        for c in range(start, stop, BLOCK_C):
            if AHEAD:
                next_s_1, next_z_1, next_s_2, next_z_2 = unit_steps(
                    scale, o_n, N, c + BLOCK_C, C, GROUP, stride_n, stride_g, stride_z
                )
                next_t_1, next_t_2 = unit_sums(sums, o_m, M, c + BLOCK_C, C)
                x_1, x_2, x_3, x_4 = load_quarters(x, o_m, M, c, C, EVEN, BLOCK_C)
                b_w = tl.reshape(w.load([0, i_n, c // 4]), (ROWS, BLOCK_C // 4)) if JOINT else w.load([i_n, c // 4])
                b_y = unit_product(b_y, b_w, x_1, x_2, x_3, x_4, s_1, z_1, s_2, z_2, t_1, t_2)
                s_1, z_1, s_2, z_2, t_1, t_2 = next_s_1, next_z_1, next_s_2, next_z_2, next_t_1, next_t_2
            else:  # with x before the weights a thread spilled 700 bytes at 64 rows (compute capability 8.6)
                b_w = tl.reshape(w.load([0, i_n, c // 4]), (ROWS, BLOCK_C // 4)) if JOINT else w.load([i_n, c // 4])
                x_1, x_2, x_3, x_4 = load_quarters(x, o_m, M, c, C, EVEN, BLOCK_C)
                s_1, z_1, s_2, z_2 = unit_steps(scale, o_n, N, c, C, GROUP, stride_n, stride_g, stride_z)
                t_1, t_2 = unit_sums(sums, o_m, M, c, C)
                b_y = unit_product(b_y, b_w, x_1, x_2, x_3, x_4, s_1, z_1, s_2, z_2, t_1, t_2)
    return b_y


@triton.jit
def _skinny_kernel(
    x,
    w,
    scale,
    token_scale,
    sums,
    bias,
    y,
    M,
    N,
    C,
    stride_n,
    stride_g,
    stride_z,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_n, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n, m_m = o_n < N, o_m < M
    chunk = tl.cdiv(tl.cdiv(C, BLOCK_C), SPLITS) * BLOCK_C
    if SCALE:
        b_scale = tl.load(scale + o_n, mask=m_n, other=0.0)
    if BIAS:
        b_bias = tl.load(bias + o_n, mask=m_n & (i_s == 0), other=0.0).to(tl.float32)
    wait()
    if TOKEN_SCALE:
        b_token = tl.load(token_scale + o_m, mask=m_m, other=0.0)
    start, stop = i_s * chunk, tl.minimum((i_s + 1) * chunk, C)
    b_y = streamed(
        x, w, scale, sums, i_n * BLOCK_N, o_n, o_m, start, stop, M, N, C, stride_n, stride_g, stride_z,
        GROUP, AHEAD, EVEN, False, BLOCK_N, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    if SCALE:
        b_y *= b_scale[:, None]
    if TOKEN_SCALE:
        b_y *= b_token[None, :]
    if BIAS:
        b_y += b_bias[:, None]
    p_y = y + (i_s.to(tl.int64) * M + o_m[None, :]) * N + o_n[:, None]
    tl.store(p_y, b_y, mask=m_n[:, None] & m_m[None, :])


@triton.jit
def scale_of(b_max, LARGEST: tl.constexpr):
    """The scale of a token whose largest magnitude is b_max, and what to multiply it by."""
    b_scale = tl.div_rn(tl.maximum(b_max, LARGEST * _TINY), LARGEST)
    return b_scale, tl.div_rn(1.0, b_scale)  # a division an element would take longer than its memory


@triton.jit
def _quantize_kernel(x, xq, scale, C, LARGEST: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    wait()
    b_x = tl.load(x + i_m * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_max = tl.abs(b_x)
    if not WHOLE:
        for c in range(BLOCK, C, BLOCK):
            b_max = tl.maximum(b_max, tl.abs(tl.load(x + i_m * C + c + o_c, mask=c + o_c < C, other=0.0).to(tl.float32)))
    b_scale, b_inverse = scale_of(tl.max(b_max, 0), LARGEST)
    b_q = tl.clamp(b_x * b_inverse, -LARGEST, LARGEST)
    tl.store(xq + i_m * C + o_c, b_q.to(xq.dtype.element_ty), mask=o_c < C)
    if not WHOLE:
        for c in range(BLOCK, C, BLOCK):
            b_x = tl.load(x + i_m * C + c + o_c, mask=c + o_c < C, other=0.0).to(tl.float32)
            b_q = tl.clamp(b_x * b_inverse, -LARGEST, LARGEST)
            tl.store(xq + i_m * C + c + o_c, b_q.to(xq.dtype.element_ty), mask=c + o_c < C)
    tl.store(scale + i_m, b_scale)


@triton.jit
def _widen_kernel(w, scale, y, C, BLOCK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < C
    wait()
    b_w = tl.load(w + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(y + i_n * C + o_c, b_w * tl.load(scale + i_n), mask=m_c)


@triton.jit
def _widen_int4_kernel(
    w, scale, y, C, WORDS, stride_n, stride_g, stride_z, GROUP: tl.constexpr, QUARTER: tl.constexpr, BLOCK: tl.constexpr
):
    i_n = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait()
    b_w = tl.load(w + i_n * WORDS + o_w, mask=o_w < WORDS, other=0)
    for part in tl.static_range(4):
        o_c = o_w // QUARTER * 4 * QUARTER + part * QUARTER + o_w % QUARTER
        m_c = (o_w < WORDS) & (o_c < C)
        p_step = scale + i_n * stride_n + o_c // GROUP * stride_g
        b_step = tl.load(p_step, mask=m_c, other=0.0).to(tl.float32)
        b_zero = tl.load(p_step + stride_z, mask=m_c, other=0.0).to(tl.float32)
        b_level = ((b_w >> 4 * part) & 15).to(tl.float32)
        tl.store(y + i_n * C + o_c, (b_level - b_zero) * b_step, mask=m_c)


@triton.jit
def _half_sums_kernel(x, sums, M, C, HALF: tl.constexpr, BLOCK: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_c = o_h[:, None] * HALF + tl.arange(0, HALF)[None, :]
    wait()
    b_x = tl.load(x + i_m * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    tl.store(sums + o_h * M + i_m, tl.sum(b_x, 1), mask=o_h < tl.cdiv(C, HALF))


def linear(x: Activations, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """See `fastdllm.kernels.linear.reference.linear`."""
    parts = split_k_partials(x, weight, scale, bias)
    y = parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)
    return y.view(*x.shape[:-1], -1)


def split_k_partials(x: Activations, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """`linear` of x [..., C] with M rows, as S partial sums [S, M, N], which the kernel that reads them adds up.

    One sum is of x's dtype, several are fp32.
    """
    rows = flat(x)
    M, skinny_rows = rows.shape[0], is_skinny(rows, weight, scale)
    if weight.dtype == FP8 and scale is not None:
        # The library's row-wise fp8 product writes bf16 only, and wants multiples of 16.
        known = rows.is_cuda and rows.dtype == torch.bfloat16 and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
        if not (skinny_rows or known):
            return reference.linear(rows, weight, scale, bias)[None]
        tokens = as_fp8(rows)
        given = (tokens.values, weight, scale, bias, tokens.scale)
        if skinny_rows:
            return skinny(*given, tokens.dtype, **tile_of(tokens.values, weight))
        if TensorDescriptor is not None and (few := fp8.tiling(M, *weight.shape, weight.device)):
            return fp8.fp8_product(*given, tokens.dtype, **few)
        return scaled_mm(*given)[None]
    if isinstance(rows, Quantized) or (scale is None and not skinny_rows):
        return reference.linear(rows, weight, scale, bias)[None]
    if skinny_rows:
        return skinny(rows, weight, scale, bias, **tile_of(rows, weight, scale))
    return F.linear(rows, widen(weight, scale, rows.shape[1], rows.dtype), bias)[None]


def flat(x: Activations) -> Activations:
    """x [..., C] as rows [M, C]."""
    if isinstance(x, Quantized):
        return Quantized(x.values.reshape(-1, x.shape[-1]), x.scale.flatten(), x.dtype)
    return x.reshape(-1, x.shape[-1])


def as_fp8(rows: Activations) -> Quantized:
    """Rows [M, C] in fp8."""
    return rows if isinstance(rows, Quantized) else quantize_rows(rows)


def is_skinny(rows: Activations, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether the product of rows [M, C] is bound by reading the weight, and the skinny kernel can read it."""
    most = WIDENED_ROWS if weight.dtype in (torch.int8, torch.uint8) else SKINNY_ROWS
    readable = TensorDescriptor is not None and weight.shape[1] * weight.itemsize % 16 == 0
    if weight.dtype == torch.uint8:
        readable &= group_of(weight, scale, rows.shape[1]) % HALF == 0
    return readable and rows.dtype.itemsize == 2 and rows.shape[0] <= most


def tile_of(x: Tensor, w: Tensor, scale: Tensor | None = None) -> dict[str, int]:
    """Tile for x [M, C] and w [N, ...] of the kernel that `skinny` launches."""
    if scale is not None and hopper_int4.applies(x, w, scale):
        return hopper_int4.tiling(len(x), len(w), x.shape[1])
    tile = tiling(len(x), len(w), w.dtype)
    return tile | hopper.tiling(len(x), *w.shape, w.dtype) if hopper.applies(x, w) else tile


def tiling(M: int, N: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the skinny kernel for M rows and N output channels, weights of `dtype`.

    Hopper now takes `hopper.py` for most of these. Measured on an H200 (torch 2.11, triton 3.6, 2026-11-28) in a captured
    chain of layers, us a layer, LLaDA at 32 rows, as (block_n, block_c, stages, splits): qkv (64, 128, 3, 2) 138.8, (64,
    128, 4, 1) 140.6, (128, 64, 5, 2) 143.3; out (64, 128, 4, 2) 137.9, (64, 256, 3, 2) 139.1, (64, 256, 3, 8) 143.2; down
    (64, 256, 3, 2) 138.2, (64, 128, 4, 4) 138.9, (128, 64, 4, 2) 151.0. Dream's out and down prefer (64, 256, 3, 2) too,
    its qkv (64, 128, 4, 3). In fp8 no candidate gained 1 us of 98; in int8, of 142, (64, 256, 3, 4) gained 3 for down.

    As `scripts.benchmarks.tiles` times them, ms of a forward (2026-11-30). v2 at 8 rows: fp8 qkv (64, 256, 4, 4) 2.47,
    (64, 256, 4, 5) 2.51, (64, 256, 4, 3) 2.52, down (64, 512, 4, 2) 2.48, (64, 256, 3, 7) 2.53, (64, 512, 3, 2) 2.54; bf16
    qkv (64, 128, 4, 5) 4.04, (64, 128, 4, 4) 4.06, (64, 128, 4, 3) 4.09, down (64, 256, 4, 2) 4.05, (64, 256, 3, 2) 4.09.
    LLaDA at 32 rows: fp8 out (64, 512, 3, 2) 2.93, (64, 512, 4, 2) 2.96; bf16 down (64, 256, 4, 2) 4.49, (64, 256, 3, 2)
    4.51. In int4, as (stages, splits): at 32 rows, out and down (4, 4) 3.17, (3, 4) 3.32, qkv (3, 2) 3.26, (2, 2) 3.31,
    (4, 2) 3.52; at 16 rows, qkv (4, 2) 3.18, (3, 2) 3.25.
    """
    block_m, num_warps = min(64 if dtype == torch.uint8 else 128, max(16, triton.next_power_of_2(M))), 4
    if dtype == torch.uint8:
        # Four stages of 24 KB let two programs run on a multiprocessor, three stages three. LLaDA's 256 programs of out and
        # down are spread more evenly by two.
        shape = (64, UNIT, 4 if block_m == 16 or N <= 4096 else 3, 1 if N > 16384 else 2 if N > 8192 else 4)
    elif block_m == 128:
        shape = (64, 128, 3, 1)
    elif N > 16384:
        shape = (64, 256 // dtype.itemsize, 4, 1)
    elif N > 8192:
        shape = (64, 256 // dtype.itemsize, 3, 2)
    elif N > 4096:
        shape = (64, 256 // dtype.itemsize, 4, 4 if block_m == 16 else 3)
    elif dtype == torch.int8:
        # int8 meets tiles of x that take twice its bytes, and leaves less room for deep ones.
        shape = (64, 256, 3, 4)
    else:
        # In fp8 a fourth stage keeps the next kernel's programs waiting for shared memory, which counts from 32 rows on.
        shape = (64, 512 // dtype.itemsize, 3 if dtype == FP8 and block_m > 16 else 4, 2)
    names = ("block_n", "block_c", "num_stages", "splits")
    return dict(zip(names, shape, strict=True)) | {"block_m": block_m, "num_warps": num_warps}


def skinny(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    token_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    block_m: int,
    block_n: int,
    block_c: int,
    splits: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """x [M, C] times w [N, C] transposed, w widened to x's dtype on the way, times scale [N] and token_scale [M], plus bias
    [N]: [splits, M, N], of `dtype` if there is one split and fp32 otherwise.

    `hopper.py` and `hopper_int4.py` do it where they apply."""
    if hopper.applies(x, w):
        return hopper.product(
            x, w, scale, bias, token_scale, dtype, block_m=block_m, block_n=block_n, block_c=block_c, splits=splits,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if scale is not None and hopper_int4.applies(x, w, scale):
        return hopper_int4.product(
            x, w.view(torch.int16), scale, bias, group_of(w, scale, x.shape[1]), block_m=block_m, block_n=block_n,
            block_c=block_c, splits=splits, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    (M, C), N = x.shape, w.shape[0]
    w, sums, strides, groups = of_groups(x, w, scale)
    tile_c = block_c // PARTS if groups["GROUP"] else block_c  # elements of w that hold block_c channels
    y = torch.empty((splits, M, N), dtype=torch.float32 if splits > 1 else dtype or x.dtype, device=x.device)
    _skinny_kernel[(triton.cdiv(N, block_n) * splits, triton.cdiv(M, block_m))](
        x.contiguous(),
        TensorDescriptor.from_tensor(w, [block_n, tile_c]),
        y if scale is None else scale,
        y if token_scale is None else token_scale,
        sums,
        y if bias is None else bias,
        y,
        M,
        N,
        C,
        *strides,
        BIAS=bias is not None,
        SCALE=scale is not None and not groups["GROUP"],
        **groups,
        TOKEN_SCALE=token_scale is not None,
        EVEN=C % block_c == 0,
        SPLITS=splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=num_warps,
        num_stages=stages(num_stages, tile_c * block_n * w.itemsize + block_c * block_m * x.itemsize, x.device),
        **LAUNCH,
    )
    return y


def of_groups(x: Tensor, w: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, ...], dict[str, Any]]:
    """What the kernels of x [M, C] need for 4-bit weights: their words, the sums of x, the strides of the scale and the
    constants GROUP and AHEAD. Other weights come back as they are, and GROUP is 0."""
    group = group_of(w, scale, x.shape[1])
    if not group or scale is None:
        return w, x, (0, 0, 0), {"GROUP": 0, "AHEAD": False}
    # Where x takes registers there are none to spare: 1,240 bytes of a thread spilled at 64 rows on compute capability 8.6.
    return w.view(torch.int16), half_sums(x), scale.stride(), {"GROUP": group, "AHEAD": reads_shared(x.device)}


def half_sums(x: Tensor) -> Tensor:
    """Sums of the channels of x [M, C] in each half of a unit of 4-bit weights, fp32 [ceil(C / 128), M]."""
    M, C = x.shape
    halves = triton.cdiv(C, HALF)
    sums = torch.empty((halves, M), dtype=torch.float32, device=x.device)
    grid = (M, triton.cdiv(halves, SUMS))
    _half_sums_kernel[grid](x.contiguous(), sums, M, C, HALF=HALF, BLOCK=SUMS, num_warps=4, **LAUNCH)
    return sums


def group_of(weight: Tensor, scale: Tensor | None, channels: int) -> int:
    """Channels that share a step in 4-bit weights, at least half a unit where all do; 0 for other weights."""
    if weight.dtype != torch.uint8 or scale is None:
        return 0
    return max(HALF, group_size(scale, channels)) if scale.shape[1] == 1 else group_size(scale, channels)


def widen(weight: Tensor, scale: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Weights [N, channels] in 8 bits (int8) or 4 in `dtype`. The library's conversion takes four times as long."""
    N, C = len(weight), channels
    w = torch.empty((N, C), dtype=dtype, device=weight.device)
    if group := group_of(weight, scale, C):
        words = weight.contiguous().view(torch.int16)
        size = words.shape[1]
        block = min(WIDEN_BLOCK // PARTS, triton.next_power_of_2(size))
        _widen_int4_kernel[(N, triton.cdiv(size, block))](
            words, scale, w, C, size, *scale.stride(), GROUP=group, QUARTER=UNIT // PARTS, BLOCK=block, num_warps=4, **LAUNCH
        )
        return w
    _widen_kernel[(N, triton.cdiv(C, WIDEN_BLOCK))](
        weight.contiguous(), scale, w, C, BLOCK=min(WIDEN_BLOCK, triton.next_power_of_2(C)), num_warps=8, **LAUNCH
    )
    return w


def scaled_mm(xq: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, token_scale: Tensor) -> Tensor:
    """The library's fp8 product of xq [M, C] and weight [N, C] transposed, scaled by row and channel; bf16."""
    return torch._scaled_mm(
        xq,
        weight.t(),
        scale_a=token_scale.unsqueeze(1),
        scale_b=scale.unsqueeze(0),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def quantize_tiling(M: int, C: int) -> tuple[int, int]:
    """Channels that a program of `_quantize_kernel` holds at a time, and its warps.

    32 rows of 12288 channels take 5.8, 4.7 and 4.6 us whole with 8, 16 and 32 warps, of 4096 channels 1.8, 1.6 and 1.8
    (H200).
    """
    if C <= 4096:
        return triton.next_power_of_2(C), 16
    return (4096, 8) if M > FEW_ROWS else (triton.next_power_of_2(C), 32)


def quantize_rows(x: Tensor) -> Quantized:
    """x [M, C] to fp8 with one scale a row."""
    M, C = x.shape
    xq = torch.empty((M, C), dtype=FP8, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    block, warps = quantize_tiling(M, C)
    _quantize_kernel[(M,)](
        x.contiguous(), xq, scale, C, LARGEST=FP8_MAX, BLOCK=block, WHOLE=block >= C, num_warps=warps, **LAUNCH
    )
    return Quantized(xq, scale, x.dtype)
