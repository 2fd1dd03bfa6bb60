# SPDX-License-Identifier: Apache-2.0
"""What the engine counts, reads and stops for, on models that say exactly what a test wants."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm import registry, testing
from fastdllm.blocks import Block, Pass
from fastdllm.build import assemble, runner
from fastdllm.caches import none
from fastdllm.engine import Request, decode
from fastdllm.kernels.attention import reference as attention
from fastdllm.models.transformer import Layer
from fastdllm.prompts import encode
from fastdllm.store import UNIT
from tests.random_models import FAMILIES, MASK, STOP, VOCAB, WatchedRunner, accepted, prompts, random_model
from tests.reference.network import PlainNetwork
from tests.scripted_model import scripted_model

CACHES = {f: list(testing.caches_of(f)) for f in FAMILIES}
PAIRS = [(f, c) for f in FAMILIES for c in CACHES[f]]


@pytest.mark.parametrize("cache", CACHES["llada"])
def test_sure_blocks_cost_one_forward_each(cache: str) -> None:
    """A block that its opening pass fills is not run again."""
    out = fastdllm.generate(scripted_model("llada", [7]), prompts(5), cache=cache, gen_length=32, block_length=8)
    assert out.stats.row_forwards == [4]


@pytest.mark.parametrize("family, cache", PAIRS)
def test_nothing_runs_after_the_stop(family: str, cache: str) -> None:
    """The stop comes with the first forward, at the answer's start: one forward, no tokens, nothing after it."""
    out = fastdllm.generate(scripted_model(family, [STOP]), prompts(8, 5), cache=cache, gen_length=64, block_length=8)
    assert out.stats.row_forwards == [1, 1]
    assert out.stats.row_tokens == [0, 0]
    assert [s.tolist()[-1] for s in out.sequences] == [STOP, STOP]
    assert [len(s) for s in out.sequences] == [9, 6]


@pytest.mark.parametrize("family, cache", PAIRS)
def test_a_stop_after_an_open_position_does_not_end_the_row(family: str, cache: str) -> None:
    """Position 10 is the stop and sure; 8 and 9 before it are unsure and come later, but they come."""
    tokens, conf = [7] * 10 + [STOP] + [7] * 30, [1.0] * 8 + [0.5, 0.6] + [1.0] * 30
    out = fastdllm.generate(scripted_model(family, tokens, conf), prompts(8), cache=cache, gen_length=24, block_length=8)
    assert out.sequences[0][8:].tolist() == [7, 7, STOP]
    assert out.stats.row_tokens == [2]
    assert 2 <= out.stats.row_forwards[0] <= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_tokens_of_the_prompt_are_text(family: str) -> None:
    given = torch.tensor([STOP, 3, STOP, 4, STOP])
    out = fastdllm.generate(scripted_model(family, [7]), given, gen_length=8, block_length=8)
    assert out.sequences[0].tolist() == [STOP, 3, STOP, 4, STOP] + [7] * 8
    assert out.stats.row_tokens == [8]


@pytest.mark.parametrize("cache", CACHES["v2"])
def test_v2_stop_as_the_first_token_of_a_block(cache: str) -> None:
    """It comes from a commit pass, or from the prefill; both end the row (defect A of the published sampler)."""
    tokens = [7] * 16 + [STOP] + [7] * 80
    for prompt, tokens_before in ((8, 8), (16, 0), (5, 11)):
        out = fastdllm.generate(scripted_model("v2", tokens), prompts(prompt), cache=cache, gen_length=64, block_length=8)
        assert out.sequences[0].tolist()[-1] == STOP
        assert out.stats.row_tokens == [tokens_before]


@pytest.mark.parametrize("cache", CACHES["v2"])
def test_v2_rows_that_finish_in_block_0(cache: str) -> None:
    """All rows end before anything was ever committed (defect C), other rows go on (D, N)."""
    given = prompts(3, 5, 8, 9, 16)
    out = fastdllm.generate(scripted_model("v2", [7] * 6 + [STOP]), given[:2], cache=cache, gen_length=64, block_length=8)
    assert out.stats.row_tokens == [3, 1]
    model = random_model("v2", 4)
    together = fastdllm.generate(model, given, cache=cache, gen_length=20, block_length=8, batch_size=2)
    for row, prompt in enumerate(given):
        alone = fastdllm.generate(model, prompt, cache=cache, gen_length=20, block_length=8)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert alone.stats.row_positions[0] == together.stats.row_positions[row]


@pytest.mark.parametrize("prompt", [7, 8, 9, 15, 16, 17])
def test_v2_reads_its_whole_prompt(prompt: int) -> None:
    """Every committed token of the prompt changes the answer's logits, for prompts around whole blocks (defect B)."""
    model, given = random_model("v2"), prompts(prompt)[0]
    options: dict[str, Any] = {"gen_length": 8, "block_length": 8, "threshold": 1.0, "stop_ids": (), "trace": True}

    def last(ids: Tensor) -> Tensor:
        return fastdllm.generate(model, ids, **options).trace[-1].confidence

    base = last(given)
    for at in range(prompt):
        changed = given.clone()
        changed[at] = (changed[at] + 1) % STOP
        assert not torch.equal(last(changed).nan_to_num(), base.nan_to_num()), at


@pytest.mark.parametrize("cache", CACHES["v2"])
@pytest.mark.parametrize("gen_length", [1, 3, 7, 8, 9, 31])
def test_v2_answers_are_as_long_as_asked(cache: str, gen_length: int) -> None:
    given = prompts(3, 8, 13)
    before = [p.clone() for p in given]
    out = fastdllm.generate(random_model("v2"), given, cache=cache, gen_length=gen_length, block_length=8, stop_ids=())
    assert [len(s) for s in out.sequences] == [len(p) + gen_length for p in given]
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_v2_sub_blocks_must_divide_the_block() -> None:
    with pytest.raises(ValueError, match="small_block_size=3 must divide block_length=8"):
        fastdllm.generate(random_model("v2"), prompts(3), gen_length=8, block_length=8, small_block_size=3)


def test_v2_sub_block_cache_recomputes_the_sub_block_alone() -> None:
    """One prefill, then per sub-block of 4: the whole block while its first token is open, its own rows afterwards."""
    out = fastdllm.generate(
        random_model("v2"),
        prompts(8),
        cache="sub_block",
        block_length=8,
        small_block_size=4,
        threshold=1,
        gen_length=8,
        stop_ids=(),
        trace=True,
    )
    # First token by the prefill; 1 whole pass and 2 narrow ones; then 4 tokens, whole passes until the first is known.
    narrow = out.stats.row_forwards[0] * 8 - out.stats.row_positions[0]
    assert out.stats.row_forwards[0] == 8
    assert narrow % 4 == 0 and narrow >= 8


class Everything(none.Cache):
    """Recomputes all that a block may see in every forward, its first one too."""

    def open(self, block: Block) -> Pass | None:
        return None


@pytest.mark.parametrize("decoder", [{"threshold": 0.2}, {"decoder": "quota", "steps": 10}], ids=str)
def test_v2_fused_commit_gives_what_recomputing_everything_gives(decoder: dict[str, Any]) -> None:
    """Sub-blocks as wide as blocks: to fuse a block's commit with the next one's first step leaves nothing stale."""
    given, options = prompts(3, 6), {"block_length": 8, "small_block_size": 8, "gen_length": 30, "stop_ids": (), **decoder}
    model = random_model("v2")
    fused = fastdllm.generate(model, given, cache="fused", **options)
    whole = fastdllm.generate(model, given, cache=Everything(), **options)
    assert [s.tolist() for s in fused.sequences] == [s.tolist() for s in whole.sequences]
    assert fused.stats.row_forwards == whole.stats.row_forwards
    assert sum(fused.stats.row_positions) < sum(whole.stats.row_positions)


@pytest.mark.parametrize("steps", [8, 16])
def test_v2_fused_needs_fewer_forwards_and_positions_than_sub_blocks(steps: int) -> None:
    """Two whole blocks of 16 after a prompt of one, in sub-blocks of 4: no forward of its own for the commit."""
    model, costs = random_model("v2"), {}
    for cache in ("fused", "sub_block"):
        options = {"block_length": 16, "small_block_size": 4, "decoder": "quota", "steps": steps, "gen_length": 32}
        out = fastdllm.generate(model, prompts(16), cache=cache, stop_ids=(), **options)
        costs[cache] = (out.stats.row_forwards[0], out.stats.row_positions[0])
    assert costs["fused"][0] < costs["sub_block"][0]
    assert costs["fused"][1] < costs["sub_block"][1]


def counted_forwards(model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch) -> Counter:
    counts: Counter = Counter()
    forward, logits, layer = model.network.forward, model.network.logits, Layer.forward

    def network_forward(ids: Tensor, window: Any, store: Any, *args: Any) -> Tensor:
        counts["forwards"] += 1
        counts["positions"] += int((window.pos < store.k.shape[3] - 1).sum())  # without padding, which is in the last slot
        return forward(ids, window, store, *args)

    def layer_forward(self: Layer, h: Tensor, *args: Any) -> Any:
        counts["layer tokens"] += h.shape[:-1].numel()
        return layer(self, h, *args)

    def head(hidden: Tensor) -> Tensor:
        counts["head rows"] = max(counts["head rows"], hidden.shape[:-1].numel())
        return logits(hidden)

    monkeypatch.setattr(model.network, "forward", network_forward)
    monkeypatch.setattr(model.network, "logits", head)
    monkeypatch.setattr(Layer, "forward", layer_forward)
    return counts


@pytest.mark.parametrize("family, cache", PAIRS)
def test_counts_are_those_of_the_network(family: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(family)
    counts = counted_forwards(model, monkeypatch)
    out = fastdllm.generate(model, prompts(60), cache=cache, gen_length=16, block_length=8, small_block_size=4, stop_ids=())
    assert counts["forwards"] == out.stats.forwards == out.stats.row_forwards[0]
    assert counts["positions"] == out.stats.row_positions[0]
    assert counts["layer tokens"] == out.stats.row_layer_tokens[0] <= counts["positions"] * model.spec.layers
    assert cache == "top_rho" or counts["layer tokens"] == counts["positions"] * model.spec.layers
    assert counts["head rows"] <= 8, "the head runs on the block alone, also in a prefill"
    assert out.stats.row_tokens == [16] and out.stats.tokens == 16
    counts.clear()
    out = fastdllm.generate(model, prompts(5, 5, 5), cache=cache, gen_length=16, block_length=8, stop_ids=())
    assert counts["forwards"] == out.stats.forwards <= sum(out.stats.row_forwards)
    assert counts["positions"] == sum(out.stats.row_positions)
    assert counts["head rows"] <= 3 * 8


READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy", "__contains__")


@pytest.mark.each_choice
@pytest.mark.parametrize("family, cache", PAIRS)
def test_one_host_read_per_forward(family: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = random_model(family), Counter()
    monkeypatch.setattr(attention, "_row_by_row", attention._masked)  # what other devices than a CPU run

    def counting(name: str, original: Any) -> Any:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            reads[name] += 1
            return original(self, *args, **kwargs)

        return read

    for decoder in registry.names("decoders"):
        if not accepted(family, cache, decoder):
            continue
        options = {"gen_length": 12, "block_length": 8, "decoder": decoder, "cache": cache}
        config = fastdllm.DecodeConfig(**options)
        run, executor = assemble(model, config), runner(model, config)
        requests = [Request(p, 12) for p in prompts(5, 9)]
        with monkeypatch.context() as patch:
            for name in READS:
                patch.setattr(Tensor, name, counting(name, getattr(Tensor, name)))
            reads.clear()
            steps = sum(1 for _ in decode(model, requests, run, executor))
        # A prompt is read when its blocks are looked up: before it waits, and where all are known to find what they share.
        prompts_read = {name: min(reads[name], 2 * len(requests)) for name in ("cpu", "numpy")}
        assert sum((reads - Counter(prompts_read)).values()) <= steps + len(requests), (decoder, dict(reads))


@pytest.mark.parametrize("family, cache", PAIRS)
def test_the_store_is_allocated_once(family: str, cache: str) -> None:
    model = random_model(family)
    watched = WatchedRunner()
    made = watched.canvases
    run = assemble(model, fastdllm.DecodeConfig(gen_length=24, block_length=8, cache=cache))
    addresses = set()
    for _ in decode(model, [Request(p, 24) for p in prompts(5, 9, 3)], run, watched, rows=2):
        addresses.add((made[0].store.k.data_ptr(), made[0].store.v.data_ptr(), made[0].x.data_ptr()))
    assert len(made) == 1 and len(addresses) == 1
    slots = (made[0].store.k.shape[1] - 1) * UNIT + made[0].store.k.shape[3]
    assert slots == 4 * UNIT, "two requests of two units each at once"


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_guidance_equals_two_plain_forwards(family: str, scale: float) -> None:
    for seed in range(4):
        model, given = random_model(family, seed), prompts(6)[0]
        out = fastdllm.generate(
            model, given, decoder="quota", schedule="even", cfg_scale=scale, gen_length=12, block_length=6, stop_ids=()
        )
        net, shift = PlainNetwork(model), model.spec.shift
        net.banned = torch.zeros(VOCAB, dtype=torch.bool)
        x = torch.cat([given, torch.full((12,), MASK)])
        for start in (6, 12):
            for _ in range(6):
                unguided = x.clone()
                unguided[:6] = MASK
                conditional, free = (net(ids)[start - shift : start + 6 - shift] for ids in (x, unguided))
                logits = free + (scale + 1) * (conditional - free)
                logits[:, MASK] = -torch.inf
                conf, top = logits.softmax(-1).max(-1)
                at = conf.masked_fill(x[start : start + 6] != MASK, -1).argmax()
                x[start + at] = top[at]
        assert out.sequences[0].tolist() == x.tolist()
        plain = fastdllm.generate(model, given, decoder="quota", cache="none", gen_length=12, block_length=6, stop_ids=())
        assert plain.stats.row_forwards == out.stats.row_forwards


def test_guidance_of_a_row_does_not_depend_on_the_batch() -> None:
    model, given = random_model(), prompts(4, 9, 6)
    options: dict[str, Any] = {"cfg_scale": 1.0, "gen_length": 10, "block_length": 5}
    together = fastdllm.generate(model, given, batch_size=2, **options)
    for row, prompt in enumerate(given):
        assert torch.equal(fastdllm.generate(model, prompt, **options).sequences[0], together.sequences[row])


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_confidence_is_the_untempered_probability_of_the_chosen_token(temperature: float) -> None:
    sampler = assemble(random_model(), fastdllm.DecodeConfig(temperature=temperature, top_p=0.8, top_k=9)).sampler
    logits, banned = torch.randn(3, 8, VOCAB), random_model().banned
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
        given = logits.to(dtype)
        noise = sampler.draw([torch.Generator().manual_seed(i) for i in range(3)], 8, VOCAB)
        scores = sampler(given, banned, noise)
        expected = given.float().masked_fill(banned, -torch.inf).softmax(-1).gather(-1, scores.top[..., None])[..., 0]
        torch.testing.assert_close(scores.conf, expected, rtol=1e-4, atol=tolerance)
        assert scores.conf.dtype == torch.float32


def test_low_temperature_does_not_make_flat_logits_look_sure() -> None:
    """Published code took the confidence after tempering: flat logits then pass any threshold."""
    model = random_model()
    model.network.head.weight.data.mul_(0.05)
    out = fastdllm.generate(model, prompts(5), temperature=0.1, threshold=0.9, gen_length=16, block_length=8, stop_ids=())
    assert out.stats.row_forwards == [16]


def test_sampled_tokens_follow_the_truncated_distribution() -> None:
    from fastdllm.sampling import Sampler

    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]).expand(20_000, 1, 5)
    banned = torch.zeros(5, dtype=torch.bool)
    noise = torch.rand(20_000, 1, 6, generator=torch.Generator().manual_seed(0))
    tempered = (torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]) / 0.8).softmax(-1)
    for options, kept in (({}, 5), ({"top_k": 2}, 2), ({"top_p": 0.8}, 2), ({"top_p": 1e-6}, 1)):
        top = Sampler(temperature=0.8, **options)(logits, banned, noise).top.flatten()
        expected = torch.where(torch.arange(5) < kept, tempered, 0)
        observed = top.bincount(minlength=5) / len(top)
        torch.testing.assert_close(observed, expected / expected.sum(), atol=0.012, rtol=0)


def test_extreme_logits_are_sampled_without_overflow() -> None:
    sampler = assemble(random_model(), fastdllm.DecodeConfig(temperature=1.0)).sampler
    logits = torch.randn(1, 4, VOCAB) * 1e3
    noise = sampler.draw([torch.Generator().manual_seed(0)], 4, VOCAB)
    noise[0, 0, 0], noise[0, 1, 1] = 0.0, 1.0  # the ends of the uniform draw
    scores = sampler(logits, random_model().banned, noise)
    assert scores.conf.isfinite().all()
    assert (scores.top != MASK).all()


def test_stream_gives_each_forward_as_it_happens_and_can_be_closed() -> None:
    model = random_model()
    seen = 0
    for step in fastdllm.stream(model, prompts(5), gen_length=16, block_length=8, threshold=1.0):
        assert step.ids.shape == step.confidence.shape == step.committed.shape == (1, 8)
        assert (step.committed & step.confidence.isnan()).sum() == 0
        seen += 1
        if seen == 3:
            break
    assert seen == 3


@pytest.mark.parametrize("family, cache", PAIRS)
def test_the_trace_tells_the_whole_story(family: str, cache: str) -> None:
    model, given = random_model(family), prompts(5, 8)
    out = fastdllm.generate(model, given, cache=cache, gen_length=13, block_length=8, stop_ids=(), trace=True)
    assert len(out.trace) == out.stats.forwards
    committed = sum(int(step.committed.sum()) for step in out.trace)
    assert committed == 2 * 13
    assert sorted(row for step in out.trace for row in step.done) == [0, 1]
    assert abs(sum(step.seconds for step in out.trace) - out.stats.seconds) < 1e-6


def test_a_stop_token_before_a_constraint_does_not_end_the_answer() -> None:
    """The model says stop everywhere; the fixed token behind is part of the answer all the same."""
    model = random_model("llada")
    stop = model.spec.stop_ids[0]
    model.network.head.weight.data.zero_()
    model.banned[:] = True
    model.banned[stop] = False
    out = fastdllm.generate(model, [torch.arange(3, 8)], gen_length=12, block_length=4, constraints={9: 7})
    assert out.sequences[0][5 + 9] == 7
    assert out.stats.row_tokens == [10]
    assert len(out.sequences[0]) == 5 + 11


def test_draws_depend_on_no_longer_block_of_the_run() -> None:
    """A short answer is the same in a run with room for long ones: a server decodes both."""
    model = fastdllm.load("tiny-llada")
    config = fastdllm.DecodeConfig(gen_length=12, temperature=1.0, seed=3, block_length=32, stop_ids=())
    short = fastdllm.generate(model, "Question: What is 3 + 4?\nAnswer:", config).sequences[0]
    run = assemble(model, config.replace(gen_length=64))
    prompt = encode(model, "Question: What is 3 + 4?\nAnswer:")[0]
    steps = decode(model, [Request(prompt, 12, 3), Request(prompt, 64, 4)], run, runner(model, config))
    done = {number: result for step in steps for number, result in step.done.items()}
    assert done[0].ids.tolist() == short.tolist()
