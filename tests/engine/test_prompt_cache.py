# SPDX-License-Identifier: Apache-2.0
"""Blocks that an earlier prompt had are not computed again, and nothing but the counts tells."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm import PromptCache, build
from fastdllm.engine import Request, Result, decode, prefixes
from fastdllm.engine.admission import size_of
from fastdllm.models import Model
from fastdllm.models.transformer import Transformer
from fastdllm.runners import cuda_graph, eager
from tests.engine.test_nan import BAD, poisoned
from tests.engine.test_source import Scripted, request
from tests.random_models import STOP, WatchedRunner, random_model, triples
from tests.runners.test_bucketing import emulated

SHARING = [(f, c, d) for f, c, d in triples() if (c in ("block", "sub_block") and f == "v2") or c == "causal"]
SMALL = {"gen_length": 20, "block_length": 8, "small_block_size": 4}


def told(result: Result) -> Any:
    """What a request's result says, but for positions and log-probabilities."""
    return result.ids.tolist(), result.committed_at.tolist(), result.forwards, result.stopped


def check_equal(result: Result, want: Result, layers: int) -> None:
    """Equal to one that computed its whole prompt, up to rounding of passes of another width; what was not computed is
    counted."""
    assert told(result) == told(want)
    assert torch.allclose(result.logprobs, want.logprobs, atol=1e-4, equal_nan=True)
    assert result.positions + result.cached == want.positions and not want.cached
    assert result.layer_tokens + result.cached * layers == want.layer_tokens


def alone(model: Model, run: fastdllm.decoding.Decoding, asked: Request) -> Result:
    run = replace(run, prompt_cache=0)
    (result,) = (r for step in decode(model, [asked], run, eager.Runner()) for r in step.done.values())
    return result


def prompts(common: int, *lengths: int, seed: int = 0) -> list[Tensor]:
    """Random prompts that begin with the same tokens and have so many of their own."""
    made = torch.Generator().manual_seed(seed)
    first = torch.randint(0, STOP, (common,), generator=made)
    return [torch.cat([first, torch.randint(0, STOP, (n,), generator=made)]) for n in lengths]


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 12))])
@pytest.mark.parametrize("graphed", [False, True])
def test_requests_that_come_and_go_share_prompts_and_give_what_each_gives_alone(
    seed: int, graphed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over decoders with branches and shadows, withdrawals, small canvases and budgets, layer reuse; a list and a source."""
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    monkeypatch.setattr(prefixes, "WORTH_A_ROUND", 8)
    rng, cached = random.Random(f"{seed} {graphed}"), 0
    for tried, (family, cache, decoder) in enumerate(rng.sample(SHARING, len(SHARING))):
        if tried >= 4 and cached:
            break
        model, options = random_model(family, seed), dict(SMALL)
        if family == "v2" and decoder != "self_verify" and rng.random() < 0.3:  # A2D counts its blocks from the prompt's end
            model.spec = replace(model.spec, grid_at_prompt=True, shift=0)
        whole = ("lopa", "draft_verify", "psd", "wino", "joint_threshold", "self_verify")
        if family == "v2" and decoder not in whole and rng.random() < 0.4:
            options |= {"reuse_k": 2, "layer_subset": "1", "trim_ratio": rng.choice([None, 0.5])}
        kept = rng.choice([None, 1, 8, 16, 40, PromptCache(64)])
        run = build.assemble(model, fastdllm.DecodeConfig(cache=cache, decoder=decoder, prompt_cache=kept, **options))
        stems = [torch.tensor([rng.randrange(STOP) for _ in range(rng.randint(1, 90))]) for _ in range(2)]
        asked = []
        for _ in range(rng.randint(3, 9)):
            stem = rng.choice(stems)
            one = request(rng, run)
            cut = rng.choice([len(stem), rng.randint(0, len(stem))])
            asked.append(replace(one, prompt=torch.cat([stem[:cut], one.prompt])))
            if rng.random() < 0.3:
                asked.append(replace(asked[-1], seed=5))
        arrivals: dict[int, list[Request]] = {}
        withdrawals: dict[int, list[int]] = {}
        at = 0
        for number, one in enumerate(asked):
            at += rng.choice([0, 0, 1, 2, 5])
            arrivals.setdefault(at, []).append(one)
            if rng.random() < 0.3:
                withdrawals.setdefault(at + rng.randint(0, 3), []).append(number)
        runner = cuda_graph.Runner() if graphed else eager.Runner()
        source: Any = Scripted(arrivals, withdrawals)
        if rng.random() < 0.4:
            source, withdrawals = asked, {}
        done: dict[int, Result] = {}
        for step in decode(model, source, run, runner, **rng.choice([{"rows": 2}, {"positions": 500}, {"rows": 8}])):
            done |= step.done
        gone = {n for withdrawn in withdrawals.values() for n in withdrawn}
        assert done.keys() >= set(range(len(asked))) - gone
        for number, result in done.items():
            check_equal(result, alone(model, run, asked[number]), model.spec.layers)
            cached += result.cached
    assert cached, "nothing was shared, so nothing was tested"


@pytest.mark.parametrize("cache", ["block", "sub_block"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_batch_computes_a_common_beginning_once(cache: str, batch: int) -> None:
    """Whether the rows share a round or follow one another; up to the rounding of a pass of another width."""
    model, given = random_model("v2"), prompts(100, 5, 9, 20, 3, 40, 0)
    shared, without = (
        fastdllm.generate(model, given, cache=cache, batch_size=batch, prompt_cache=kept, **SMALL) for kept in (None, 0)
    )
    # 100 tokens are 12 blocks of 8; the last whole block of a prompt is computed in any case.
    assert shared.stats.row_cached == [0, 96, 96, 88, 96, 88]
    assert without.stats.row_cached == [0] * 6
    for name in ("sequences", "logprobs", "committed_at"):
        for a, b in zip(getattr(shared, name), getattr(without, name), strict=True):
            assert torch.allclose(a.float(), b.float(), atol=1e-5), name
    assert shared.stats.row_forwards == without.stats.row_forwards
    saved = [a - b for a, b in zip(without.stats.row_positions, shared.stats.row_positions, strict=True)]
    assert saved == shared.stats.row_cached
    assert shared.stats.summary()["cached_positions"] == sum(saved)


def test_blocks_counted_from_the_prompts_end_are_shared_where_they_begin_alike() -> None:
    """A2D: a prompt of 103 tokens begins with a block of 7, one of 111 too, one of 105 with a block of 1."""
    model = random_model("v2")
    model.spec = replace(model.spec, grid_at_prompt=True, shift=0)
    shared, without = (
        fastdllm.generate(model, prompts(100, 3, 11, 5), cache="block", prompt_cache=kept, **SMALL) for kept in (None, 0)
    )
    assert shared.stats.row_cached == [0, 7 + 11 * 8, 0]
    for name in ("sequences", "logprobs", "committed_at"):
        for a, b in zip(getattr(shared, name), getattr(without, name), strict=True):
            assert torch.allclose(a.float(), b.float(), atol=1e-5), name


def test_a_prompt_that_is_read_causally_is_shared_too() -> None:
    model, given = random_model("nemotron"), prompts(100, 3, 30, 5)
    shared, without = (
        fastdllm.generate(model, given, prompt_cache=kept, gen_length=20, block_length=8) for kept in (None, 0)
    )
    assert shared.stats.row_cached == [0, 96, 64]  # chunks of 32, without the last whole one
    for name in ("sequences", "logprobs", "committed_at"):
        for a, b in zip(getattr(shared, name), getattr(without, name), strict=True):
            assert torch.allclose(a.float(), b.float(), atol=1e-5), name


def test_counted_positions_are_those_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = random_model("v2"), prompts(70, 5, 9)
    ran = 0
    network = model.network.forward

    def counting(ids: Tensor, *rest: Any) -> Tensor:
        nonlocal ran
        ran += ids.numel()
        return network(ids, *rest)

    monkeypatch.setattr(model.network, "forward", counting)
    out = fastdllm.generate(model, given, cache="block", batch_size=1, **SMALL)
    assert ran == sum(out.stats.row_positions) and out.stats.row_cached == [0, 64]


def test_a_five_shot_evaluation_computes_a_fifth_of_its_prompts() -> None:
    """The shipped task, tokenised and prompted as lm-eval does; positions of the network do not depend on its weights."""
    tiny = fastdllm.load("tiny-fast-dllm-v2")
    spec = replace(tiny.spec, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=16, max_length=2048)
    torch.manual_seed(0)
    network = Transformer(spec)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    model = replace(tiny, spec=spec, network=network)
    examples, questions = (problems(name) for name in ("fewshot", "test"))
    stem = "".join(f"Question: {e['question']}\nAnswer: {e['answer']}\n\n" for e in examples[:5])
    texts = [f"{stem}Question: {q['question']}\nAnswer:" for q in questions[:40]]
    given = [torch.tensor(model.tokenizer(text)["input_ids"]) for text in texts]
    shared, without = (
        fastdllm.generate(model, given, gen_length=8, batch_size=8, prompt_cache=kept, stop_ids=()) for kept in (None, 0)
    )
    size = model.spec.block_causal
    prefill = sum(len(ids) // size * size for ids in given)
    assert sum(without.stats.row_positions) - sum(shared.stats.row_positions) == sum(shared.stats.row_cached)
    assert sum(shared.stats.row_cached) >= 0.8 * prefill
    assert all(map(torch.equal, shared.sequences, without.sequences))


def problems(name: str) -> list[dict[str, str]]:
    path = Path(fastdllm.__file__).parent / "tasks" / "gsm_symbolic" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_kept_is_what_a_later_prompt_reads() -> None:
    """Changed keys and values change the answer's log-probabilities: they are no decoration."""
    model, (given,) = random_model("v2"), prompts(0, 50)
    kept = PromptCache()
    first = fastdllm.generate(model, given, prompt_cache=kept, **SMALL)
    again = fastdllm.generate(model, given, prompt_cache=kept, **SMALL)
    assert (first.stats.row_cached, again.stats.row_cached) == ([0], [40])
    assert torch.allclose(first.logprobs[0], again.logprobs[0], atol=1e-5)
    for node in kept._recent:
        node.kv = node.kv + 1
    wrong = fastdllm.generate(model, given, prompt_cache=kept, **SMALL)
    assert not torch.allclose(first.logprobs[0], wrong.logprobs[0], atol=1e-3)


def test_nothing_is_kept_that_no_other_request_of_a_list_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    keep = PromptCache.keep

    def watched(self: PromptCache, *given: Any) -> None:
        keep(self, *given)
        taken.append(self.kept)

    monkeypatch.setattr(PromptCache, "keep", watched)
    fastdllm.generate(random_model("v2"), [*prompts(20, 40, 40), *prompts(0, 60, seed=1)], batch_size=1, **SMALL)
    assert taken == [16, 16, 16]
    taken.clear()
    fastdllm.generate(random_model("v2"), prompts(0, 60), **SMALL)
    assert not taken


def test_the_turns_of_a_conversation_share_prompts_and_answers() -> None:
    model, kept = random_model("v2"), PromptCache()
    (history,) = prompts(0, 30)
    for turn in range(4):
        out, want = (fastdllm.generate(model, history, prompt_cache=cache, stop_ids=(), **SMALL) for cache in (kept, 0))
        assert torch.equal(out.sequences[0], want.sequences[0]), turn
        # All but what the last answer's block and this turn's question add.
        assert turn == 0 or out.stats.row_cached[0] >= len(history) - 7 - 8 - 8
        history = torch.cat([out.sequences[0], prompts(0, 7, seed=turn)[0]])


def test_a_row_waits_a_round_for_what_another_one_computes_but_not_for_one_that_is_gone() -> None:
    model = random_model("v2")
    run = build.assemble(model, fastdllm.DecodeConfig(cache="block", **SMALL))
    asked = [Request(prompt, 20) for prompt in prompts(100, 5, 9, 7)]
    rounds = [step.rows for step in decode(model, Scripted({0: asked}, {}), run, eager.Runner(), rows=3)]
    assert rounds[0] == [0] and {1, 2} <= {n for rows in rounds[1:3] for n in rows}
    done: dict[int, Result] = {}
    for step in decode(model, Scripted({0: asked, 3: []}, {1: [0]}), run, eager.Runner(), rows=3):
        done |= step.done
    assert done.keys() == {1, 2}
    for number, result in done.items():
        check_equal(result, alone(model, run, asked[number]), model.spec.layers)
    assert [done[1].cached, done[2].cached] == [96, 96]


def test_a_withdrawn_row_leaves_what_it_computed_to_the_others() -> None:
    """The leader goes before it begins: the second computes the prompt; or after: nobody computes it again."""
    model = random_model("v2")
    run = build.assemble(model, fastdllm.DecodeConfig(cache="block", **SMALL))
    asked = [Request(prompt, 20) for prompt in prompts(100, 5, 9)]
    for gone, cached in ((0, 0), (1, 96)):
        done: dict[int, Result] = {}
        for step in decode(model, Scripted({0: asked, 2: []}, {gone: [0]}), run, eager.Runner(), rows=2):
            done |= step.done
        assert done[1].cached == cached
        check_equal(done[1], alone(model, run, asked[1]), model.spec.layers)


@pytest.mark.filterwarnings("ignore:answer")
def test_nan_of_one_prompt_reaches_no_prompt_that_begins_alike() -> None:
    """Attention on a CPU carries it from the prompt's end to its beginning, whose blocks another prompt has too."""
    model, given = poisoned("v2"), [p + (p <= BAD).long() * (BAD + 1) for p in prompts(40, 20, 20, 20)]
    want = fastdllm.generate(model, given, prompt_cache=0, batch_size=1, **SMALL)
    given[0][-10] = BAD
    for kept in (None, PromptCache()):
        out = fastdllm.generate(model, given, prompt_cache=kept, batch_size=1, **SMALL)
        assert out.logprobs[0].isnan().any() and out.stats.row_cached == [0, 0, 40]
        for i in (1, 2):
            assert torch.equal(out.sequences[i], want.sequences[i])
            assert torch.allclose(out.logprobs[i], want.logprobs[i], atol=1e-5)


def test_the_budget_bounds_what_is_kept_and_the_longest_unused_goes_first() -> None:
    model, kept = random_model("v2"), PromptCache(positions=47)
    a, b, c = (prompts(0, 24, seed=seed)[0] for seed in range(3))
    room = {"cache": "block", "block_length": 8, "small_block_size": 4, "gen_length": 4, "prompt_cache": kept}

    def ask(prompt: Tensor) -> int:
        out = fastdllm.generate(model, prompt, **room)
        assert kept.kept <= kept.positions
        return out.stats.row_cached[0]

    assert [ask(a), ask(b)] == [0, 0]  # 3 blocks each, of 5 that fit: a's last one goes
    assert ask(a) == 16
    assert ask(c) == 0
    assert [ask(a), ask(b)] == [16, 0]
    with pytest.raises(ValueError, match="positions=0 must be an integer of at least 1"):
        PromptCache(0)


def test_another_model_size_or_weights_start_empty() -> None:
    """Keys of other weights would be wrong without a word."""
    model, kept, (given,) = random_model("v2", 1), PromptCache(), prompts(0, 50)
    options = {"cache": "block", "gen_length": 8, "small_block_size": 4}

    def ask(model: Model, block: int) -> int:
        out, want = (
            fastdllm.generate(model, given, block_length=block, prompt_cache=cache, **options) for cache in (kept, 0)
        )
        assert torch.allclose(out.logprobs[0], want.logprobs[0], atol=1e-5)
        return out.stats.row_cached[0]

    assert [ask(model, 8), ask(model, 8), ask(model, 16), ask(model, 16)] == [0, 40, 0, 32]
    assert [ask(random_model("v2", 2), 16), ask(model, 16), ask(model, 16)] == [0, 0, 32]
    with torch.no_grad():
        model.network.layers[0].qkv.weight.mul_(1.5)
    assert [ask(model, 16), ask(model, 16)] == [0, 32]


@pytest.mark.parametrize("seeds", [(1, 1), (1, 2), (1, 2, 1)])
def test_runs_that_take_turns_share_with_their_own_model_only(seeds: tuple[int, ...]) -> None:
    """A run whose cache another model took over meanwhile leaves it alone."""
    kept, given, made = PromptCache(), prompts(60, 5, 9, 20), {seed: random_model("v2", seed) for seed in set(seeds)}
    models = [made[seed] for seed in seeds]
    runs = [fastdllm.stream(model, given, batch_size=1, prompt_cache=kept, **SMALL) for model in models]
    results: list[dict[int, Result]] = [{} for _ in runs]
    for steps in zip_longest(*runs):
        for done, step in zip(results, steps, strict=True):
            done.update({} if step is None else step.done)
    for model, done in zip(models, results, strict=True):
        assert done.keys() == set(range(len(given)))
        want = fastdllm.generate(model, given, prompt_cache=0, **SMALL)
        for number, result in done.items():
            assert result.ids.tolist()[: len(want.sequences[number])] == want.sequences[number].tolist()
            logprobs = want.logprobs[number]
            assert torch.allclose(result.logprobs[: len(logprobs)], logprobs, atol=1e-5), number
    assert sum(result.cached for result in results[-1].values()) > 0


def test_a_cache_that_cannot_serve_is_refused() -> None:
    given = torch.arange(5)
    for family, options in (("llada", {"cache": "dual"}), ("v2", {"cache": "none"}), ("v2", {"cfg_scale": 0.5})):
        for kept in (64, PromptCache()):
            with pytest.raises(ValueError, match=r"prompt_cache=.* needs a cache whose finished blocks never change"):
                fastdllm.generate(random_model(family), given, gen_length=8, prompt_cache=kept, **options)
        fastdllm.generate(random_model(family), given, gen_length=8, block_length=8, prompt_cache=0, **options)
    for value in (-1, 1.5, "many", True):
        with pytest.raises(ValueError, match="prompt_cache="):
            fastdllm.DecodeConfig(prompt_cache=value)


def test_prompts_of_a_run_lie_on_the_canvas_where_they_are_read() -> None:
    """Every lane of a decoder with branches gets the blocks."""
    model, runner = random_model("v2"), WatchedRunner()
    run = build.assemble(model, fastdllm.DecodeConfig(cache="block", decoder="lopa", **SMALL))
    asked = [Request(prompt, 20) for prompt in prompts(100, 5, 9)]
    list(decode(model, asked, run, runner))
    (canvas,) = runner.canvases
    k, (size, other) = canvas.store.k, (size_of(request, run, model.spec) for request in asked)
    assert run.lanes > 1 and size == other
    for lane in range(2 * run.lanes):
        assert k[:, lane * size, :, :96].any() and torch.equal(k[:, lane * size, :, :96], k[:, 0, :, :96]), lane
