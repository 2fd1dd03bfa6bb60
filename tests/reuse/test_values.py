# SPDX-License-Identifier: Apache-2.0
"""Reuse by values: which positions each layer runs for, what the others keep, and that nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import kernels
from fastdllm.build import assemble, runner
from fastdllm.engine import Request, decode
from fastdllm.forward import Window
from fastdllm.models.quantize import quantize
from fastdllm.models.transformer import Layer
from fastdllm.reuse.base import Work
from fastdllm.reuse.values import ValueReuse
from tests.random_models import MASK, prompts, random_model

OPTIONS: dict[str, Any] = {"cache": "top_rho", "gen_length": 29, "block_length": 8, "stop_ids": (), "threshold": 0.3}
SETTINGS = [
    {"ratio": 0.25, "refresh": 3},
    {"ratio": 0.5, "refresh": 99},
    {"ratio": 0.01, "refresh": 99},
    {"ratio": 0.25, "refresh": 3, "suffix": 4, "keep_last": False, "refresh_blocks": 2},
    {"ratio": 0.5, "refresh": 99, "suffix": 4},  # the last position is seen, what lies before it is hidden
]
PROMPT, BLOCK, T = 5, 8, 20


def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Grows by the positions of each row with every layer that runs."""
    seen, forward = [], Layer.forward

    def watched(
        self: Layer, y: torch.Tensor, h: torch.Tensor, norm: torch.Tensor, index: int, window: Window, *args: Any
    ) -> Any:
        seen.append(window.pos.tolist())
        return forward(self, y, h, norm, index, window, *args)

    monkeypatch.setattr(Layer, "forward", watched)
    return seen


class Passes:
    """One row of a LLaDA-like model: a whole pass, after it passes over the block that run `active` positions a layer."""

    def __init__(self) -> None:
        self.model = random_model()
        self.x = torch.randint(0, MASK, (T,))
        self.x[PROMPT : PROMPT + BLOCK] = MASK
        self.store = self.model.network.new_store(1, T + 1)
        self.reuse = ValueReuse(99, (0, 1), 0.5, BLOCK)
        self.state = self.reuse.allocate(self.model, 1)
        self.row = torch.zeros(1, dtype=torch.long)
        pos = torch.arange(T)[None]
        self.model.network(self.x[None], Window(self.row, pos, torch.full_like(pos, T), T, True), self.store)

    def __call__(self, active: int, needed: tuple[int, ...] = (), padding: int = 0) -> torch.Tensor:
        pos = torch.tensor([[*range(PROMPT, PROMPT + BLOCK), *[T] * padding]])
        ids, marks = self.x[pos % T], torch.isin(pos, torch.tensor(needed, dtype=torch.long))
        quota = torch.tensor([active])
        window = Window(self.row, pos, torch.full_like(pos, T), T, True)
        work = Work(
            self.row,
            window,
            ids,
            marks,
            quota,
            torch.tensor([T]),
            active * (active < pos.shape[1]),
            int(active < pos.shape[1]),
        )
        return self.model.network(ids, window, self.store, self.reuse.layers_of(self.state, work))


def test_what_changed_runs_first_then_what_predicts_then_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes()
    passes(BLOCK)
    passes.x[PROMPT + 6] = 3
    seen = ran(monkeypatch)
    passes(4, needed=(PROMPT + 2, PROMPT + 7))
    assert seen[0] == [[PROMPT + 6, PROMPT + 2, PROMPT + 7, PROMPT + 0]]
    assert seen[1][0][0] == PROMPT + 6, "the second layer, too, runs for what changed"
    assert len(seen) == 2 and len(seen[1][0]) == 4


def test_positions_that_are_left_out_keep_keys_and_deltas() -> None:
    passes = Passes()
    before = passes(BLOCK)
    assert torch.allclose(passes(1), before, atol=1e-5), "nothing changed: what the layers added stands"
    keys, cached = passes.store.k.clone(), passes.state.cached.clone()
    passes.x[PROMPT + 6] = 3
    after = passes(1)
    moved = (passes.store.k != keys).any(-1).any(2)[:, 0]  # [L, T + 1]
    assert moved.nonzero().tolist() == [[0, PROMPT + 6], [1, PROMPT + 6]]
    moved = (passes.state.cached != cached).any(-1)[0]  # by layer and position modulo the block
    assert moved.nonzero().tolist() == [[0, (PROMPT + 6) % BLOCK], [1, (PROMPT + 6) % BLOCK]]
    assert ((after - before).abs() > 1e-4).any(-1)[0].nonzero()[:, 0].tolist() == [6]


def test_padding_stays_out_of_what_is_kept() -> None:
    padded, plain = Passes(), Passes()
    plain.x.copy_(padded.x)
    for store, other in ((plain.store.k, padded.store.k), (plain.store.v, padded.store.v)):
        store.copy_(other)
    assert T % BLOCK in [p % BLOCK for p in range(PROMPT, PROMPT + BLOCK)], "padding would collide with a position"
    plain(BLOCK), padded(BLOCK + 2, padding=2)
    torch.testing.assert_close(padded.state.cached[:, :, :BLOCK], plain.state.cached[:, :, :BLOCK], rtol=1e-5, atol=1e-5)
    before = plain.state.cached.clone()
    plain(3), padded(3, padding=2)
    torch.testing.assert_close(padded.state.cached[:, :, :BLOCK], plain.state.cached[:, :, :BLOCK], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.state.cached, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "int8"])
def test_projected_values_are_those_that_the_layer_stores(quantized: bool) -> None:
    passes = Passes()
    if quantized:
        quantize(passes.model.network, "int8")
    pos = torch.arange(T)[None]
    passes.model.network(passes.x[None], Window(passes.row, pos, torch.full_like(pos, T), T, True), passes.store)
    layer = passes.model.network.layers[0]
    y, _ = kernels.rmsnorm(passes.model.network.embed(passes.x[None]), layer.attn_norm, layer.spec.rms_eps)
    stored = passes.store.v[0, :, :, :T].transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer.values(y), stored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reuse", [{"cache": "top_rho", "refresh": 1}, {"cache": "top_rho", "ratio": 0.97}], ids=str)
def test_fp8_weights_give_the_same_tokens_where_all_runs(reuse: dict[str, Any]) -> None:
    """Between layers tokens may be in fp8, also where a rule runs the layers."""
    model, given = random_model(), prompts(5, 8)
    quantize(model.network, "fp8")
    options = {**OPTIONS, **reuse}
    out, plain = (fastdllm.generate(model, given, **chosen) for chosen in (options, {**OPTIONS, "cache": "dual"}))
    assert all(torch.equal(a, b) for a, b in zip(out.sequences, plain.sequences, strict=True))


def test_running_all_is_the_plain_layer() -> None:
    passes, plain = Passes(), Passes()
    passes.x[PROMPT + 1] = plain.x[PROMPT + 1] = 7
    plain.store.v.copy_(passes.store.v), plain.store.k.copy_(passes.store.k)
    plain.x.copy_(passes.x)
    pos = torch.arange(PROMPT, PROMPT + BLOCK)[None]
    window = Window(plain.row, pos, torch.full_like(pos, T), T, True)
    want = plain.model.network(plain.x[pos], window, plain.store)
    torch.testing.assert_close(passes(BLOCK), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(passes.store.v, plain.store.v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [{}, {"first_token": "rule"}], ids=["forced", "rule"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_row_of_a_batch_equals_the_row_alone(setting: dict[str, Any], first: dict[str, str]) -> None:
    model, given = random_model("dream" if first else "llada"), prompts(5, 8, 11, 3)
    options = {**OPTIONS, **setting, **first}
    together = fastdllm.generate(model, given, batch_size=3, **options)
    for row, prompt in enumerate(given):
        alone = fastdllm.generate(model, prompt, **options)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert alone.stats.row_forwards[0] == together.stats.row_forwards[row]
        assert alone.stats.row_layer_tokens[0] == together.stats.row_layer_tokens[row]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_padded_passes_keep_their_own_share(family: str) -> None:
    """Blocks of more than 64 positions share a forward at different widths; each row runs its share of its own width."""
    model, given = random_model(family), prompts(3, 9)
    requests = [Request(given[0], 90), Request(given[1], 75)]
    long = {"gen_length": 90, "block_length": 90, "ratio": 0.3, "refresh": 99, "threshold": 0.9}
    config = fastdllm.DecodeConfig(**{**OPTIONS, **long})
    chosen = assemble(model, config), runner(model, config)
    shared = list(decode(model, requests, *chosen))
    assert max(len(step.rows) for step in shared) == 2
    together = {row: r for step in shared for row, r in step.done.items()}
    for row, request in enumerate(requests):
        (alone,) = (r for step in decode(model, [request], *chosen) for r in step.done.values())
        assert torch.equal(together[row].ids, alone.ids)
        assert (together[row].forwards, together[row].layer_tokens) == (alone.forwards, alone.layer_tokens)


def test_a_larger_share_and_more_refreshes_run_more() -> None:
    def share(**setting: Any) -> float:
        out = fastdllm.generate(random_model(), prompts(11), **{**OPTIONS, "threshold": 1.0, **setting})
        assert out.stats.row_forwards == [29]
        return out.stats.row_layer_tokens[0] / (out.stats.row_positions[0] * 2)

    by_ratio = [share(ratio=r, refresh=99) for r in (0.1, 0.3, 0.6, 1.0)]
    by_refresh = [share(ratio=0.1, refresh=n) for n in (99, 4, 2, 1)]
    assert by_ratio == sorted(set(by_ratio)) and by_refresh == sorted(set(by_refresh))
    assert by_ratio[-1] == by_refresh[-1] == 1
    # Of a block's 7 denoising passes after its opening the first runs all 8 positions, the others one in each layer.
    assert by_ratio[0] < 0.9


def test_branches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder='lopa'.*cache='top_rho' skips positions"):
        fastdllm.generate(random_model(), prompts(5), cache="top_rho", decoder="lopa", gen_length=8)
    given, options = prompts(5), {"decoder": "lopa", "gen_length": 16, "block_length": 8, "stop_ids": ()}
    whole = fastdllm.generate(random_model(), given, cache="top_rho", ratio=1, **options)
    dual = fastdllm.generate(random_model(), given, cache="dual", **options)
    assert torch.equal(whole.sequences[0], dual.sequences[0])
