# SPDX-License-Identifier: Apache-2.0
"""fp8 products of about a hundred to a thousand rows on a GPU.

So many rows are too many to be bound by reading the weight, and too few to give the library's tiles of a narrow weight to
all multiprocessors. Here several programs share the channels of a tile where tiles are few, and the bulk copy engine fetches
both operands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdllm.kernels.device import TensorDescriptor, multiprocessors, shared_memory, stages
from fastdllm.kernels.dot import dot
from fastdllm.kernels.pdl import LAUNCH, wait

TILE = 128
LONG = 8192  # channels from which on splitting them costs less than narrower tiles


@triton.jit
def _fp8_kernel(
    x,
    w,
    scale,
    token_scale,
    bias,
    y,
    M,
    N,
    C,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Neighbours read the same rows of the weight.
    tiles_m = tl.cdiv(M, BLOCK_M)
    i_m, i_t = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    i_s, i_n = i_t % SPLITS, i_t // SPLITS
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    chunk = tl.cdiv(tl.cdiv(C, BLOCK_C), SPLITS) * BLOCK_C
    b_scale = tl.load(scale + o_n, mask=m_n, other=0.0)
    if BIAS:
        b_bias = tl.load(bias + o_n, mask=m_n & (i_s == 0), other=0.0).to(tl.float32)
    wait()
    b_token = tl.load(token_scale + o_m, mask=m_m, other=0.0)
    b_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for c in range(i_s * chunk, tl.minimum((i_s + 1) * chunk, C), BLOCK_C):
        b_y = dot(x.load([i_m * BLOCK_M, c]), tl.trans(w.load([i_n * BLOCK_N, c])), b_y)
    b_y *= b_scale[None, :] * b_token[:, None]
    if BIAS:
        b_y += b_bias[None, :]
    p_y = y + (i_s.to(tl.int64) * M + o_m[:, None]) * N + o_n[None, :]
    tl.store(p_y, b_y, mask=m_m[:, None] & m_n[None, :])


def tiling(M: int, N: int, C: int, device: torch.device) -> dict[str, int] | None:
    """Tile of the kernel for M rows, N output channels and C input channels; None where the library is as fast.

    Measured on an H200 (torch 2.11, triton 3.6, 2026-11-30) with the norm that adds the parts up, us of the library and
    here. Down of v2-7B: 128 rows 49.6 and 28.0, 256 rows 51.4 and 37.2, 352 rows 55.0 and 50.1, 768 rows 107.8 and 98.0,
    896 rows 105.5 and 105.8 (in three parts 141.0), 1024 rows 109.8 and 106.7; of LLaDA-8B: 128 rows 35.2 and 23.5, 256
    rows 36.3 and 29.3. Out of v2-7B: 128 rows 14.5 and 9.8, 256 rows 15.3 and 12.3, 352 rows 15.8 and 15.2. Its qkv: 128
    rows 15.0 and 11.8, 256 rows 15.6 and 16.0. Gate and up, 256 rows: 56.4 and 72.5.
    """
    rows, room = triton.cdiv(M, TILE), multiprocessors(device)
    tiles = rows * triton.cdiv(N, TILE)
    if C >= LONG and 5 * tiles <= 3 * room:
        return {"block_n": TILE, "splits": max(1, min(4, room // tiles)), "num_warps": 4, "num_stages": 5}
    if C >= LONG and rows * triton.cdiv(N, 2 * TILE) <= room and shared_memory(device) >= 4 * 3 * TILE * TILE:
        splits = 3 if 3 * rows * triton.cdiv(N, 2 * TILE) <= 2 * room else 1  # no third round of programs
        return {"block_n": 2 * TILE, "splits": splits, "num_warps": 8, "num_stages": 4}
    if 2 * tiles > room:
        return None
    return {"block_n": TILE // 2, "splits": max(1, min(4, room // (2 * tiles))), "num_warps": 4, "num_stages": 5}


def fp8_product(
    xq: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    token_scale: Tensor,
    dtype: torch.dtype,
    *,
    block_n: int,
    splits: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """xq [M, C] times weight [N, C] transposed, both fp8, times scale [N] and token_scale [M], plus bias [N]: partial sums
    [splits, M, N], of `dtype` if there is one and fp32 otherwise."""
    (M, C), N = xq.shape, len(weight)
    y = torch.empty((splits, M, N), dtype=torch.float32 if splits > 1 else dtype, device=xq.device)
    _fp8_kernel[(triton.cdiv(N, block_n) * triton.cdiv(M, TILE) * splits,)](
        TensorDescriptor.from_tensor(xq, [TILE, TILE]),
        TensorDescriptor.from_tensor(weight, [block_n, TILE]),
        scale,
        token_scale,
        y if bias is None else bias,
        y,
        M,
        N,
        C,
        BIAS=bias is not None,
        SPLITS=splits,
        BLOCK_M=TILE,
        BLOCK_N=block_n,
        BLOCK_C=TILE,
        num_warps=num_warps,
        num_stages=stages(num_stages, TILE * (TILE + block_n), xq.device),
        **LAUNCH,
    )
    return y
