# SPDX-License-Identifier: Apache-2.0
"""`lossless=N` over every rule: its own tokens, in its own order, in fewer forwards."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm import build, registry
from fastdllm.drafts import DEFAULT, Calibration, graph_of, longest, milliseconds
from fastdllm.engine import Request, decode
from fastdllm.models import Model, find_folder
from fastdllm.runners import cuda_graph
from fastdllm.testing import FAMILIES, caches_of
from scripts.studies import calibrate
from tests.random_models import prompts, random_model
from tests.runners.test_bucketing import emulated


def goes(rule: str) -> bool:
    """Whether `lossless` takes this rule."""
    try:
        build.assemble(random_model(), fastdllm.DecodeConfig(decoder=rule, lossless=2, gen_length=8))
    except ValueError:
        return False
    return True


RULES = [n for n in registry.names("decoders") if goes(n)]

PURE = {f: [c for c in caches_of(f) if registry.find("caches", c).pure] for f in FAMILIES}
# Levels at which a rule takes one token here and several there, so that a step's size has to be guessed.
MIXED: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.4},
    "quota": {"steps": 11},
    "factor": {"factor": 1.6},
    "frechet": {"delta": -0.6},
    "entropy_bound": {"gamma": 1.5},
    "adablock": {"level": 0.4, "delimiter_probability": 0.1},
    "credit": {"level": 0.4},
    "progress_threshold": {"threshold": 0.5},
    "hierarchical": {"threshold": 0.5, "low": 0.3},
    "local_leap": {"threshold": 0.5, "relaxed": 0.3},
}


def results(model: fastdllm.Model, given: list[Tensor], **options: Any) -> dict[int, Any]:
    """What the engine hands over of each request: the canvas as it was left, with masks after a stop token."""
    return {n: r for step in fastdllm.stream(model, given, **options) for n, r in step.done.items()}


def in_order(one: Tensor, fast: Tensor) -> bool:
    """Whether tokens [N] that were committed by the forwards `one` come in the same order by the forwards `fast`, those of
    one step together."""
    later, together = one[:, None] < one[None], one[:, None] == one[None]
    apart = fast[:, None] != fast[None]
    return not (later & (fast[:, None] > fast[None])).any() and not (together & apart).any()


def compare(model: fastdllm.Model, given: list[Tensor], branches: int, **options: Any) -> tuple[int, int]:
    """The decoder by itself and with `branches`: tokens, log-probabilities, order, ends. Returns the forwards of both."""
    alone, fast = results(model, given, **options), results(model, given, lossless=branches, **options)
    for row, one in alone.items():
        got, where = fast[row], f"row {row} of {model.spec.family} {options}"
        assert got.ids.tolist() == one.ids.tolist(), where
        assert got.stopped == one.stopped, where
        close = torch.allclose(got.logprobs, one.logprobs, rtol=1e-3, atol=1e-4, equal_nan=True)
        assert close, where
        assert in_order(one.committed_at, got.committed_at), where
        assert got.forwards <= one.forwards, where
    return sum(r.forwards for r in alone.values()), sum(r.forwards for r in fast.values())


@pytest.mark.each_choice
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_keeps_its_tokens_its_order_and_its_log_probabilities(family: str, rule: str) -> None:
    """Rows of unlike lengths with a stop token, under every cache whose forwards depend on the block only."""
    spent = saved = 0
    for seed, cache in enumerate(PURE[family] * (1 + (family in ("v2", "nemotron")))):
        options = {"cache": cache, "decoder": rule, "gen_length": 20, "block_length": 8, **MIXED.get(rule, {})}
        one, fast = compare(random_model(family, seed), prompts(4, 9, 6), 4 + 2 * (seed % 2), **options)
        spent, saved = spent + fast, saved + one
    # Blocks that open with a pass for one token leave little to draft at these levels.
    assert spent < saved or family in ("v2", "nemotron")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_ends_in_the_midst_of_a_walk_ends_there(family: str) -> None:
    """With every token of an answer in turn as the one that ends it; what comes after it stays open as it would."""
    model, given = random_model(family, 1), prompts(5, 8)
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "decoder": "quota"}
    full = fastdllm.generate(model, given, stop_ids=(), **options)
    spent = saved = 0
    for token in {int(t) for s, p in zip(full.sequences, given, strict=True) for t in s[len(p) :]}:
        one, fast = compare(model, given, 5, stop_ids=(token,), **options)
        spent, saved = spent + fast, saved + one
    assert spent < saved


def test_requests_keep_their_own_numbers() -> None:
    model, given = random_model("llada", 3), prompts(4, 9, 6)
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "decoder": "hierarchical"}
    own = [{"threshold": 0.9}, {"threshold": 0.3, "low": 0.1}, {}]
    run = build.assemble(model, fastdllm.DecodeConfig(lossless=4, **options))
    requests = [Request(p, 16, numbers=n) for p, n in zip(given, own, strict=True)]
    runner = build.runner(model, fastdllm.DecodeConfig())
    got = {n: r for step in decode(model, requests, run, runner) for n, r in step.done.items()}
    for row, numbers in enumerate(own):
        alone = results(model, [given[row]], **{**options, **numbers})[0]
        assert got[row].ids.tolist() == alone.ids.tolist()
        assert in_order(alone.committed_at, got[row].committed_at)
    with pytest.raises(ValueError, match="low=2"):
        list(decode(model, [Request(given[0], 16, numbers={"low": 2.0})], run, runner))


GRAPHED = [
    ("llada", {"decoder": "quota", "cache": "none"}),
    ("llada", {"decoder": "credit", "level": 0.4}),
    ("dream", {"decoder": "adablock", "level": 0.4}),
    ("dream", {"threshold": 0.4, "first_token": "rule", "cache": "prefix"}),
    ("v2", {"threshold": 0.4, "strict": True}),
]


@pytest.mark.parametrize("family, options", GRAPHED, ids=str)
def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]) -> None:
    """Rows that fill up a captured graph, and one canvas for runs that keep different states."""
    monkeypatch.setattr(cuda_graph.Runner, "_capture", emulated)
    model = random_model(family)
    options = {"gen_length": 21, "stop_ids": (), **options}
    for branches in (4, 3, 1):
        for batch in (prompts(7), prompts(5, 40, 16, 31, 3)):
            eager = fastdllm.generate(model, batch, runner="eager", lossless=branches, **options)
            graph = fastdllm.generate(model, batch, runner="cuda_graph", lossless=branches, **options)
            assert [s.tolist() for s in graph.sequences] == [s.tolist() for s in eager.sequences]
            assert graph.stats.row_forwards == eager.stats.row_forwards
            assert graph.stats.row_layer_tokens == eager.stats.row_layer_tokens


def test_a_threshold_is_no_part_of_what_shapes_a_step() -> None:
    model = random_model()
    keys = [
        build.assemble(model, fastdllm.DecodeConfig(lossless=n, threshold=t)).key for n, t in ((3, 0.8), (3, 0.9), (4, 0.9))
    ]
    assert keys[0] == keys[1] != keys[2]
    steps = [build.assemble(model, fastdllm.DecodeConfig(lossless=3, steps=n, gen_length=32)).key for n in (32, 32, 16)]
    assert steps[0] == steps[1] != steps[2]


def test_draft_verify_is_lossless_over_one_token_per_step() -> None:
    model, given = random_model("llada", 2), prompts(4, 9)
    options: dict[str, Any] = {"gen_length": 24, "block_length": 8}
    named = results(model, given, decoder="draft_verify", depth=5, **options)
    over = results(model, given, decoder="quota", lossless=5, **options)
    for row, one in named.items():
        assert one.ids.tolist() == over[row].ids.tolist()
        assert one.forwards == over[row].forwards and one.positions == over[row].positions


@pytest.mark.parametrize(
    "family, options, expected",
    [
        ("llada", {"decoder": "wino"}, "lossless=3 does not go with decoder='wino'"),
        ("llada", {"decoder": "lopa"}, "lossless=3 does not go with decoder='lopa'"),
        ("llada", {"decoder": "draft_verify"}, "lossless=3 does not go with decoder='draft_verify'"),
        ("llada", {"preset": "exact"}, "lossless=3 does not go with decoder='draft_verify', which tries branches"),
        ("llada", {"cache": "top_rho"}, "lossless=3 is lossless, but a forward under cache='top_rho'"),
        ("v2", {"cache": "sub_block"}, "cache='sub_block'"),
        ("v2", {"reuse_k": 2, "layer_subset": "1", "trim_ratio": 0.4}, "lossless=3 needs layers that run for whole passes"),
        ("llada", {"temperature": 0.5}, "lossless=3 tries several branches and needs temperature=0"),
        ("dream", {"alg_temp": 0.5}, "lossless=3 tries several branches and needs temperature=0, alg_temp=0"),
        ("llada", {"cfg_scale": 1.0}, "cfg_scale=0"),
        ("llada", {"decoder": "quota", "confidence": "random"}, "lossless=3.*confidence other than random"),
        ("llada", {"lossless": -1}, "lossless=-1 must be at least 0"),
        ("llada", {"lossless": 0}, "lossless=0 chooses by measurements, and drafts.json has none of decoder 'threshold'"),
        ("llada", {"lossless": 9}, "lossless=9 must be at most block_length=8"),
    ],
)
def test_what_it_does_not_go_with_is_named(family: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        fastdllm.generate(random_model(family), prompts(4), **{"lossless": 3, "gen_length": 16, **options})


def test_few_rules_are_left_out() -> None:
    left_out = {"draft_verify", "joint_threshold", "lopa", "psd", "self_speculate", "self_verify", "wino"}
    assert set(registry.names("decoders")) - set(RULES) == left_out


def test_a_walk_is_as_long_as_the_longest_line_of_drafts() -> None:
    assert [longest(graph_of(n)) for n in (1, 2, 3, 4, 5, 6)] == [1, 2, 3, 4, 4, 5]
    assert longest(((1,), (0, 2), (0, 1, 2))) == 3
    assert all(len(graph_of(n)) == n - 1 == len(set(graph_of(n))) for n in range(1, 40))
    assert graph_of(16)[: len(DEFAULT)] == DEFAULT


TABLE = {1: 6.0, 2: 6.5, 4: 7.5, 8: 12.0}


def test_as_many_branches_as_pay(tmp_path: Path) -> None:
    """A forward of 4 rows costs a quarter more than one of 1; with 16 requests at once arithmetic is the limit."""
    file = {"decoders": {"quota": {"drafts": [[0], [0, 1], [1]], "forwards": [100, 60, 50, 45]}}}
    (tmp_path / "drafts.json").write_text(json.dumps({**file, "milliseconds": {"cpu": TABLE}}))
    found = Calibration.read(tmp_path)
    assert found.graph("quota", 4) == ((0,), (0, 1), (1,)) and found.graph("quota", 5)[3] == (0, 1, 2)
    assert found.graph("threshold", 4) == graph_of(4)
    assert [found.best("quota", "cpu", "cpu", rows, 32, 32) for rows in (1, 16)] == [4, 1]
    assert found.best("quota", "cpu", "cpu", 1, 512, 32) == 1, "a forward over sixteen blocks costs what sixteen rows do"
    with pytest.raises(ValueError, match="none of decoder 'frechet'"):
        found.best("frechet", "cpu", "cpu", 1, 32, 32)
    model = random_model()
    model.calibration = found
    for options in ({"decoder": "quota", "lossless": 0, "block_length": 8}, {"preset": "exact", "block_length": 8}):
        asked = fastdllm.DecodeConfig(gen_length=16, **options)
        assert build.assemble(model, asked).lanes == 4
        assert build.assemble(model, asked, rows=16).lanes == 1
        assert build.assemble(model, asked.replace(batch_size=16)).lanes == 1
        assert build.assemble(model, asked.replace(batch_size=16), rows=1).lanes == 4, "as many as there are"
        for impossible in ({"temperature": 0.5}, {"cache": "none", "cfg_scale": 1.0}, {"cache": "top_rho"}):
            for rows in (1, 16):
                assert build.assemble(model, asked.replace(**impossible), rows=rows).decoder.branches == 1
    (tmp_path / "drafts.json").write_text('{"decoders": {"quota": {"drafts": 3}}}')
    with pytest.raises(ValueError, match=r"drafts\.json: not a file of scripts\.studies\.calibrate"):
        Calibration.read(tmp_path)


@pytest.mark.parametrize("kind", ["cuda", "cpu", "mps"])
def test_a_device_that_was_not_measured_is_estimated(kind: str) -> None:
    """The more positions a branch adds, the fewer branches; a large batch and a long block take none."""
    found = Calibration()
    by_rows = [found.best("quota", "?", kind, rows, 32, 32) for rows in (1, 2, 4, 8, 16, 32, 64)]
    assert by_rows == sorted(by_rows, reverse=True) and by_rows[0] > 1 and by_rows[-1] == 1
    by_size = [found.best("quota", "?", kind, 1, size, 32) for size in (4, 8, 32, 128, 1024, 4096)]
    assert by_size == sorted(by_size, reverse=True) and by_size[-1] == 1
    assert found.best("quota", "?", "cuda", 1, 32, 32) >= found.best("quota", "?", "cpu", 1, 32, 32)


def test_a_block_in_parts_costs_what_the_whole_block_does() -> None:
    """Fast-dLLM v2 recomputes the block in every forward under the caches that go with branches."""
    model = fastdllm.load("tiny-fast-dllm-v2", device="cpu")
    whole = model.calibration.best("quota", "cpu", "cpu", 1, 32, 32)
    for part in (8, 16, 32):
        asked = fastdllm.DecodeConfig(decoder="quota", lossless=0, small_block_size=part)
        assert build.assemble(model, asked).decoder.branches == whole


def test_the_costs_of_a_device_stand_beside_the_drafts_and_choose_the_branches(tmp_path: Path) -> None:
    """`calibrate --costs` by itself: the drafts stay as they are, and `lossless=0` changes no token."""
    folder = tmp_path / "model"
    shutil.copytree(find_folder("tiny-llada"), folder)
    calibrate.main(["--model", str(folder), "--settings", "--costs", "--device", "cpu"])
    before, after = (Calibration.read(place) for place in (find_folder("tiny-llada"), folder))
    assert (after.graphs, after.forwards) == (before.graphs, before.forwards)
    assert list(after.milliseconds["cpu"]) == list(calibrate.ROWS) and min(after.milliseconds["cpu"].values()) > 0
    model = fastdllm.load(str(folder), device="cpu")
    lanes = build.assemble(model, fastdllm.DecodeConfig(decoder="quota", lossless=0)).lanes
    assert lanes == after.best("quota", "cpu", "cpu", 1, 32, 32)
    assert one_answer(model, lossless=0) == one_answer(model)


@pytest.mark.parametrize("decoder", ["quota", "threshold"])
def test_nothing_is_drafted_where_a_row_more_costs_a_forward_more(decoder: str) -> None:
    """Where arithmetic is the limit the decoder runs by itself; where a forward costs the same, every draft is checked."""
    model = fastdllm.load("tiny-llada", device="cpu")
    known = model.calibration.forwards[decoder]
    for costs, lanes in (({1: 1.0, 2: 2.0}, 1), ({1: 1.0, 2: 1.0}, 1 + known.index(min(known)))):
        model.calibration = dataclasses.replace(model.calibration, milliseconds={"cpu": costs})
        assert build.assemble(model, fastdllm.DecodeConfig(decoder=decoder, lossless=0)).lanes == lanes


def one_answer(model: Model, **options: Any) -> list[int]:
    out = fastdllm.generate(model, ["Question: what is 2 + 3?"], decoder="quota", gen_length=16, block_length=16, **options)
    return out.sequences[0].tolist()


def test_time_between_and_beyond_what_was_measured() -> None:
    assert [milliseconds(TABLE, rows) for rows in (1, 3, 8, 16)] == [6.0, 7.0, 12.0, 21.0]
    assert milliseconds({2: 5.0}, 7) == 5.0
