# SPDX-License-Identifier: Apache-2.0
"""The benchmark of tiles: each tile is launched and computes the same, and what has no such tiles is refused."""

from __future__ import annotations

import pytest
import torch

from fastdllm.kernels.linear.reference import quantize_weight

pytestmark = [
    pytest.mark.usefixtures("descriptors"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled in this process, not interpreted"),
]
KINDS = [None, "fp8", "int8", "int4"]


def product(N: int, C: int, kind: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    w = torch.randn(N, C).bfloat16() * C**-0.5
    return quantize_weight(w, kind) if kind else (w, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "65"], "must be at most 64"),
        (["--rows", "3"], "must be at most 64"),
        (["--keys", "31"], "--keys 31 must be at least --width 32"),
        (["--model", "llada_moe"], "invalid choice: 'llada_moe'"),
    ],
)
def test_forwards_whose_tiles_it_cannot_change_are_refused(capsys, arguments: list[str], message: str) -> None:
    from scripts.benchmarks import tiles

    with pytest.raises(SystemExit, match="2"):
        tiles.main(["--product", "down", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_of_a_product_computes_it(assert_close, kind: str | None) -> None:
    from fastdllm.kernels.linear import triton
    from scripts.benchmarks import tiles

    w, x, found = product(48, 256, kind), torch.randn(20, 256).bfloat16(), []
    want, splits = triton.linear(x, *w), triton.tiling(20, 48, w[0].dtype)["splits"]
    for tile in tiles.candidates("out", 20, kind):
        with tiles.with_tile("out", (48, 256), tile):
            parts = triton.split_k_partials(x, *w, None)
        assert len(parts) == tile["splits"] and tile["block_m"] == 32
        assert_close(parts.float().sum(0), want.float(), 1e-2)
        found.append(tuple(tile.values()))
    assert len(found) == len(set(found)) > 15
    with tiles.with_tile("out", (48, 512), {"splits": splits + 1}):
        assert len(triton.split_k_partials(x, *w, None)) == splits, "another product keeps its tile"


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_of_gate_and_up_computes_them(
    assert_close, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    from fastdllm.kernels.silu_mul import triton
    from scripts.benchmarks import tiles

    w, x, seen = product(2 * 72, 256, kind), torch.randn(9, 256).bfloat16(), []
    want, launch = triton.linear_silu_mul(x, *w), triton.launch
    monkeypatch.setattr(triton, "launch", lambda *args, **kwargs: seen.append(kwargs) or launch(*args, **kwargs))
    for tile in tiles.candidates("gate_up", 9, kind):
        with tiles.with_tile("gate_up", (144, 256), tile):
            assert_close(triton.linear_silu_mul(x, *w).float(), want.float(), 1e-2)
        assert seen.pop() == tile
    with tiles.with_tile("gate_up", (144, 512), {"block_n": 128}):
        triton.linear_silu_mul(x, *w)
    assert seen.pop() == triton.tiling(9, 72, w[0].dtype), "another product keeps its tile"
