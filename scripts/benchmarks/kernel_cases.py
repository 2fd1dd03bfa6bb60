# SPDX-License-Identifier: Apache-2.0
"""What kernels.py times: every op at the published models' shapes, its candidates, its floor and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdllm import kernels
from fastdllm.kernels.accept import reference as accept_reference
from fastdllm.kernels.attention import reference as attention_reference
from fastdllm.kernels.attention import triton as attention_triton
from fastdllm.kernels.confidence import reference as confidence_reference
from fastdllm.kernels.confidence import triton as confidence_triton
from fastdllm.kernels.experts import reference as experts_reference
from fastdllm.kernels.linear import int4
from fastdllm.kernels.partial import reference as partial_reference
from fastdllm.kernels.partial import triton as partial_triton
from fastdllm.kernels.rmsnorm import reference as rmsnorm_reference
from fastdllm.kernels.rope_store import reference as rope_store_reference
from fastdllm.kernels.rope_store import triton as rope_store_triton
from fastdllm.kernels.silu_mul import reference as silu_mul_reference
from fastdllm.kernels.silu_mul import triton as silu_mul_triton

DEVICE = torch.device("cuda")
KEYS = 1256
L2_BYTES = 150e6
SIZES = {"bf16": 2, "fp8": 1, "int8": 1, "int4": 17 / 32}  # bytes a weight; int4 with its steps and zeros
KINDS = tuple(SIZES)


@dataclass(frozen=True)
class Model:
    """The shape of one published model."""

    name: str
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    head_dim: int = 128

    def linears(self) -> dict[str, tuple[int, int]]:
        """Fused linear layers as (output, input) channels."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (qkv, self.width),
            "o": (self.width, self.heads * self.head_dim),
            "gate_up": (2 * self.inner, self.width),
            "down": (self.width, self.inner),
        }


LLADA = Model("llada-8b", 4096, 32, 32, 12288, 126464)
DREAM = Model("dream-7b", 3584, 28, 4, 18944, 152064)

Run = Callable[[int], Any]


@dataclass
class Case:
    """One op at one shape: `runs[name](i)` computes on input set i of `copies`; `want(i)` is the reference's result."""

    op: str
    shape: str
    runs: dict[str, Run]
    want: Run | None
    nbytes: float
    flops: float = 0.0
    copies: int = 1
    ratio: float = 1e-2
    results: dict[str, dict[str, float]] = field(default_factory=dict)


def rand(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE, dtype=torch.float32) * scale).bfloat16()


def sets(nbytes: float) -> int:
    return max(1, min(32, int(L2_BYTES // nbytes) + 1))


def attention_case(m: Model, R: int, W: int, sweep: bool, keys: int = KEYS, causal_block: int = 0) -> Case:
    """R rows of W queries over `keys` keys; with `causal_block`, a block-causal prefill."""
    H, K, D = m.heads, m.kv_heads, m.head_dim
    nbytes = 2 * 2 * R * K * keys * D + 2 * 2 * R * W * H * D
    n = min(4, sets(nbytes)) if R > 1 else sets(nbytes)
    store = rand(n, 2, R, K, keys + 24, D)
    q = rand(n, R, W, H, D)
    row = torch.arange(R, device=DEVICE)
    limit = torch.full((R, W), keys, device=DEVICE)
    if causal_block:
        limit = (
            ((torch.arange(W, device=DEVICE) // causal_block + 1) * causal_block).clamp(max=keys).expand(R, W).contiguous()
        )
    seen = limit.double().mean().item() / keys

    def run(i: int, tile: dict[str, int] | None = None) -> Tensor:
        args = (q[i], store[i, 0], store[i, 1], row, limit, keys)
        return attention_triton.launch(*args, None, None, None, **tile) if tile else attention_triton.attention(*args)

    def sdpa(i: int, backend: SDPBackend) -> Tensor:
        k, v = (store[i, s, :, :, :keys] for s in (0, 1))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q[i].transpose(1, 2), k, v, enable_gqa=K < H).transpose(1, 2)

    runs: dict[str, Run] = {"kernel": run}
    if not causal_block:
        runs |= {
            f"sdpa {b.name.split('_')[0].lower()}": partial(sdpa, backend=b)
            for b in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        }
    if sweep:
        runs |= {f"tile {' '.join(map(str, t.values()))}": partial(run, tile=t) for t in attention_tiles(R * K, W * H // K)}
    want = partial(_attention_want, q, store, row, limit, keys)
    label = f"{m.name} R{R} W{W} K{keys}" + (f" causal{causal_block}" if causal_block else "")
    return Case("attention", label, runs, want, nbytes, 4 * R * W * keys * H * D * seen, n)


def _attention_want(q: Tensor, store: Tensor, row: Tensor, limit: Tensor, keys: int, i: int) -> Tensor:
    return attention_reference.attention(q[i], store[i, 0], store[i, 1], row, limit, keys)


def attention_tiles(tiles: int, packed: int) -> Iterator[dict[str, int]]:
    """Candidates around the table: tile rows, tile keys, splits, warps, stages."""
    names = ("BLOCK_M", "BLOCK_N", "SPLITS", "num_warps", "num_stages")
    if packed > 512:
        shapes = [
            (128, 64, 1, 8, 3),
            (128, 128, 1, 8, 2),
            (128, 128, 1, 8, 3),
            (128, 64, 1, 4, 3),
            (64, 64, 1, 4, 3),
            (128, 32, 1, 8, 4),
        ]
    else:
        splits = (1, 2, 4) if tiles > 100 else (4, 8, 16)
        rows = [32] if packed == 32 else [32, 64, 128]
        shapes = [
            (m, n, s, 8 if m == 128 else 4, 3) for m in rows for s in splits for n in ((32, 64, 128) if m == 32 else (64,))
        ]
        shapes += [(rows[0], n, s, 4, stages) for s in splits for n, stages in ((64, 6), (32, 8))]
    for shape in shapes:
        yield dict(zip(names, shape, strict=True))


def linear_case(m: Model, name: str, M: int, kind: str) -> Case:
    """One linear layer at M rows, its weight of one of KINDS."""
    N, C = m.linears()[name]
    size = SIZES[kind]
    n = sets(N * C * size)
    plain = [rand(N, C, scale=C**-0.5) for _ in range(n)]
    x = rand(M, C)
    weights = [(w, None) if kind == "bf16" else kernels.quantize_weight(w, kind) for w in plain]

    runs: dict[str, Run] = {"kernel": lambda i: kernels.linear(x, *weights[i])}
    if kind == "bf16":
        runs["cublas"] = lambda i: F.linear(x, plain[i])
    flops = 2.0 * M * N * C * (0.5 if kind == "fp8" else 1)
    want = lambda i: x.float() @ exact(weights[i], plain[i]).T  # noqa: E731
    return Case("linear", f"{m.name} {name} M{M} {kind}", runs, want, size * N * C, flops, n, 0.06)


def exact(weight: tuple[Tensor, Tensor | None], plain: Tensor) -> Tensor:
    """What a product is compared with, in fp32: rounding to 4 bits is an error of its own."""
    return int4.widen(*weight, plain.shape[1]) if weight[0].dtype == torch.uint8 else plain.float()


def head_case(m: Model, N: int, sweep: bool) -> Case:
    w, h = rand(m.vocab, m.width, scale=m.width**-0.5), rand(N, m.width)
    banned = torch.zeros(m.vocab, dtype=torch.bool, device=DEVICE)
    banned[-100:] = True
    runs: dict[str, Run] = {
        "kernel": lambda i: kernels.head_confidence(h, w, banned).lse,
        "cublas + confidence": lambda i: confidence_triton.confidence(F.linear(h, w), banned).lse,
        "cublas alone": lambda i: F.linear(h, w),
    }
    if sweep and N <= 64:
        for t in (
            (64, 128, 4, 4),
            (128, 128, 4, 3),
            (128, 64, 4, 4),
            (64, 64, 4, 6),
            (128, 64, 8, 4),
            (64, 256, 4, 3),
            (256, 64, 8, 4),
        ):
            runs[f"fused {' '.join(map(str, t))}"] = lambda i, t=t: (
                confidence_triton.launch_head(h, w, banned, False, False, *t).lse
            )
    want = lambda i: confidence_reference.head_confidence(h, w, banned).lse  # noqa: E731
    return Case("head_confidence", f"{m.name} N{N}", runs, want, 2 * m.vocab * m.width, 2.0 * N * m.vocab * m.width)


def small_cases(m: Model, R: int, W: int) -> Iterator[Case]:
    """The ops between the matrix products."""
    N, H, K, D = R * W, m.heads, m.kv_heads, m.head_dim
    x, r, weight = rand(R, W, m.width), rand(R, W, m.width), rand(m.width)
    label = f"{m.name} R{R} W{W}"
    yield Case("rmsnorm", label, {
        "kernel": lambda i: kernels.rmsnorm(x, weight, 1e-5, r)[0],
        "torch": lambda i: rmsnorm_reference.rmsnorm(x, weight, 1e-5, r)[0],
    }, lambda i: rmsnorm_reference.rmsnorm(x, weight, 1e-5, r)[0], 2 * 4 * N * m.width)  # fmt: skip
    gate_up = rand(R, W, 2 * m.inner)
    yield Case("silu_mul", label, {
        "kernel": lambda i: silu_mul_triton.silu_mul(gate_up),
        "torch": lambda i: silu_mul_reference.silu_mul(gate_up),
    }, lambda i: silu_mul_reference.silu_mul(gate_up), 2 * 3 * N * m.inner)  # fmt: skip
    qkv, k, v = rand(R, W, (H + 2 * K) * D), rand(R, K, KEYS, D), rand(R, K, KEYS, D)
    cos, sin = torch.randn(2, KEYS, D, device=DEVICE)
    pos = (torch.arange(W, device=DEVICE) + KEYS - W).expand(R, W).contiguous()
    args = (qkv, H, K, cos, sin, pos, torch.arange(R, device=DEVICE), k, v)
    yield Case("rope_store", label, {
        "kernel": lambda i: rope_store_triton.rope_store(*args),
        "torch": lambda i: rope_store_reference.rope_store(*args),
    }, lambda i: rope_store_reference.rope_store(*args), 2 * 2 * N * (H + 2 * K) * D)  # fmt: skip


def partial_cases(m: Model, R: int, W: int, n: int) -> Iterator[Case]:
    """A run of layers for n of the W positions of each of R rows: scores, the choice, and the way back."""
    C, device = m.width, DEVICE
    h, entry, cached, fresh, norm = rand(R, W, C), rand(R, W, C), rand(R, W, C), rand(R, n, C), rand(C)
    row, at = torch.arange(R, device=device), torch.arange(W, device=device).expand(R, W).contiguous()
    score, quota = torch.rand(R, W, device=device), torch.full((R,), n, device=device)
    seen = torch.zeros_like(at)
    state = {"row": row, "at": at, "entry": entry.clone(), "ids": at, "seen": seen}
    source = partial_reference.pick(h, score, quota, R, n, at, at, row, norm, 1e-5).source
    label, size = f"{m.name} R{R} W{W} n{n}", 2 * R * C

    def chosen(op: ModuleType, i: int) -> Tensor:
        return op.pick(h, score, quota, R, n, at, at, row, norm, 1e-5, **state).y

    def merged(op: ModuleType, i: int) -> Tensor:
        return op.merge(h, fresh, source, cached, row, at, norm, 1e-5)[0]

    def drifted(op: ModuleType, i: int) -> Tensor:
        return op.drift(h, entry[:, None], row, at)

    bytes_of = {"drift": 2 * W * size, "pick": 4 * n * size, "merge": (4 * W + 2 * n) * size}
    for name, run in (("drift", drifted), ("pick", chosen), ("merge", merged)):
        runs = {"kernel": partial(run, partial_triton), "torch": partial(run, partial_reference)}
        yield Case(name, label, runs, partial(run, partial_reference), bytes_of[name])


def gated_case(m: Model, M: int, kind: str) -> Case:
    """SwiGLU's gate and up projection and its activation, in one kernel and in two."""
    size, n = SIZES[kind], 4
    plain = [rand(2 * m.inner, m.width, scale=m.width**-0.5) for _ in range(n)]
    weights = [(w, None) if kind == "bf16" else kernels.quantize_weight(w, kind) for w in plain]
    x = rand(M, m.width)
    runs: dict[str, Run] = {
        "kernel": lambda i: kernels.linear_silu_mul(x, *weights[i]),
        "two kernels": lambda i: silu_mul_triton.silu_mul(kernels.linear(x, *weights[i])),
    }
    want = lambda i: silu_mul_reference.silu_mul(x.float() @ exact(weights[i], plain[i]).T)  # noqa: E731
    nbytes = 2.0 * size * m.inner * m.width
    return Case("linear_silu_mul", f"{m.name} M{M} {kind}", runs, want, nbytes, 4.0 * M * m.inner * m.width, n, 0.1)


def experts_case(name: str, count: int, active: int, inner: int, width: int, M: int) -> Case:
    """M positions that choose experts at random, by both ways of computing them."""
    gate_up, down = rand(2 * count * inner, width, scale=width**-0.5), rand(width, count * inner, scale=inner**-0.5)
    x, residual, norm = rand(M, 1, width), rand(M, 1, width), rand(width)
    chosen = torch.rand(M, 1, count, device=DEVICE).topk(active, -1).indices
    share = torch.rand(M, 1, active, device=DEVICE)
    flat, rest = (x[:, 0], chosen[:, 0], share[:, 0]), (count, inner, norm, 1e-5, residual)

    def side_by_side(i: int) -> Tensor:
        act = experts_reference.weighted(kernels.linear_silu_mul(x[:, 0], gate_up), *flat[1:], count, inner)
        return kernels.linear_rmsnorm(act.unsqueeze(1), down, norm, 1e-5, residual)[0]

    runs: dict[str, Run] = {
        "kernel": lambda i: kernels.experts_rmsnorm(x, chosen, share, gate_up, down, *rest)[0],
        "side by side": side_by_side,
    }
    if experts_reference.GROUPED is not None:
        by_expert = partial(experts_reference.by_expert, *flat, gate_up, down, count, inner)
        runs["sorted"] = lambda i: kernels.rmsnorm(by_expert().unsqueeze(1), norm, 1e-5, residual)[0]
    read = 1 - (1 - active / count) ** M  # the share of the experts that anybody chose
    want = lambda i: experts_reference.experts_rmsnorm(x, chosen, share, gate_up, down, *rest)[0]  # noqa: E731
    return Case(
        "experts_rmsnorm", f"{name} M{M}", runs, want, 6 * count * inner * width * read, 6 * M * active * inner * width
    )


def step_cases(m: Model, R: int, Q: int) -> Iterator[Case]:
    """Confidence of R blocks of Q positions, and the acceptance rule."""
    logits = rand(R * Q, m.vocab, scale=4)
    label = f"{m.name} R{R} Q{Q}"
    yield Case("confidence", label, {
        "kernel": lambda i: kernels.confidence(logits).lse,
        "torch": lambda i: confidence_reference.confidence(logits).lse,
    }, lambda i: confidence_reference.confidence(logits).lse, 2 * R * Q * m.vocab)  # fmt: skip
    ids, top = torch.randint(0, m.vocab, (2, R, Q), device=DEVICE)
    conf, masked = torch.rand(R, Q, device=DEVICE), torch.rand(R, Q, device=DEVICE) < 0.7
    for rule in accept_reference.RULES:
        value = torch.full((R,), 3.0 if rule == "quota" else 0.9, device=DEVICE)
        args = (ids, top, conf, masked, rule, value)
        yield Case("accept", f"{label} {rule}", {
            "kernel": partial(lambda a, i: kernels.accept(*a), args),
            "torch": partial(lambda a, i: accept_reference.accept(*a), args),
        }, partial(lambda a, i: accept_reference.accept(*a), args), 8 * 3 * R * Q, ratio=0.0)  # fmt: skip


def layer_case(m: Model, R: int, W: int, kind: str, layers: int = 8) -> Case:
    """`layers` transformer layers back to back in one graph: what the kernels and the gaps between them cost together, and
    what each part of a layer adds."""
    C, H, K, D = m.width, m.heads, m.kv_heads, m.head_dim
    ws = [{k: rand(*s, scale=s[1] ** -0.5) for k, s in m.linears().items()} for _ in range(layers)]
    quantised = [{k: (t, None) if kind == "bf16" else kernels.quantize_weight(t, kind) for k, t in w.items()} for w in ws]
    store, x0, norm = rand(layers, 2, R, K, KEYS + 24, D), rand(R, W, C), rand(C)
    cos, sin = torch.randn(2, KEYS + 24, D, device=DEVICE)
    pos = (torch.arange(W, device=DEVICE) + KEYS - W).expand(R, W).contiguous()
    row, limit = torch.arange(R, device=DEVICE), torch.full((R, W), KEYS, device=DEVICE)
    q0, f0 = rand(R, W, H, D), rand(R, W, m.inner)

    def forward(i: int, without: str = "") -> Tensor:
        y, h = kernels.rmsnorm(x0, norm, 1e-5)
        for w, (k, v) in zip(quantised, store, strict=True):
            (qkv, s1), (o, s2), (gate_up, s3), (down, s4) = (w[name] for name in ("qkv", "o", "gate_up", "down"))
            q = a = q0
            if without != "qkv":
                q = kernels.linear_rope_store(y, qkv, H, K, cos, sin, pos, row, k, v, s1)
            if without != "attention":
                a = kernels.attention(q, k, v, row, limit, KEYS)
            if without != "out":
                y, h = kernels.linear_rmsnorm(a.flatten(2), o, norm, 1e-5, h, s2)
            f = f0 if without == "gate and up" else kernels.linear_silu_mul(y, gate_up, s3)
            if without != "down":
                y, h = kernels.linear_rmsnorm(f, down, norm, 1e-5, h, s4)
        return y

    runs: dict[str, Run] = {"layers": forward}
    runs |= {
        f"without {part}": partial(forward, without=part) for part in ("qkv", "attention", "out", "gate and up", "down")
    }
    size = SIZES[kind]
    nbytes = layers * (sum(size * a * b for a, b in m.linears().values()) + 4 * R * K * KEYS * D)
    return Case("layers", f"{m.name} x{layers} R{R} W{W} {kind}", runs, None, nbytes)


def cases(sweep: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Ops and their cases as thunks: inputs are made when a case runs, and freed after it."""
    for m in (LLADA, DREAM):
        for R, W, keys in ((1, 32, KEYS), (32, 32, KEYS), (32, 32, 384), (1, KEYS, KEYS), (4, KEYS, KEYS), (32, 128, 128)):
            yield "attention", partial(attention_case, m, R, W, sweep, keys)
        for name in m.linears():
            for kind in KINDS:
                yield "linear", partial(linear_case, m, name, 32, kind)
        yield "head_confidence", partial(head_case, m, 32, sweep)
    for R in (1, 4):
        yield "attention", partial(attention_case, DREAM, R, KEYS, sweep, causal_block=32)
    for keys in (KEYS, 384):
        yield "attention", partial(attention_case, DREAM, 32, 8, sweep, keys)
    for M in (64, 128, 256, 1024):
        for name in ("o", "gate_up"):
            for kind in KINDS:
                yield "linear", partial(linear_case, LLADA, name, M, kind)
    for R, W in ((1, 32), (1, KEYS)):
        for case in small_cases(LLADA, R, W):
            yield case.op, partial(lambda c: c, case)
    for case in step_cases(LLADA, 1, 32):
        yield case.op, partial(lambda c: c, case)
    for M in (32, 64, 128, 1024):
        yield "experts_rmsnorm", partial(experts_case, "llada-moe-7b", 64, 8, 1024, 2048, M)
        yield "experts_rmsnorm", partial(experts_case, "llada2-mini", 256, 8, 512, 2048, M)
    for R, W, n in ((1, 8, 2), (1, 32, 8), (32, 8, 2), (32, 32, 8)):
        for case in partial_cases(DREAM, R, W, n):
            yield case.op, partial(lambda c: c, case)
    for m in (LLADA, DREAM):
        for kind in KINDS:
            yield "linear_silu_mul", partial(gated_case, m, 32, kind)
            yield "layers", partial(layer_case, m, 1, 32, kind)
