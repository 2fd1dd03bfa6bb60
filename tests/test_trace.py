# SPDX-License-Identifier: Apache-2.0
"""A trace says what happened: it agrees with the output, with its own curve, and with itself after saving."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm.engine import Step
from fastdllm.trace import Change, Trace, TraceStep, watch

MESSAGES = [[{"role": "user", "content": "Tom has 12 apples and buys 5 more. How many has he now?"}]]
MASK, STOP = 1, 2


@pytest.fixture(scope="module")
def model() -> fastdllm.Model:
    return fastdllm.load("tiny-llada", device="cpu")


@pytest.mark.parametrize("options", [{}, {"cache": "none", "decoder": "quota", "steps": 16}, {"factor": 1.0}])
def test_watching_gives_what_generate_gives(model: fastdllm.Model, options: dict) -> None:
    for trace in watch(model, MESSAGES, gen_length=48, block_length=16, **options):
        seen = trace.at()
        assert seen.filled == trace.filled()[-1] == sum(token != MASK for token in seen.ids)
    out = fastdllm.generate(model, MESSAGES, gen_length=48, block_length=16, **options)
    assert trace.finished
    assert trace.answer() == out.sequences[0][trace.prompt_length :].tolist()[: out.stats.tokens]
    stats = trace.stats()
    assert (stats.tokens, stats.forwards, stats.row_positions) == (
        out.stats.tokens,
        out.stats.forwards,
        out.stats.row_positions,
    )


def test_the_first_frame_comes_before_the_first_forward_and_closing_ends_it(model: fastdllm.Model) -> None:
    run = watch(model, MESSAGES, gen_length=32)
    trace = next(run)
    assert trace.steps == [] and trace.at().filled == 0
    next(run)
    run.close()
    assert len(trace.steps) == 1 and not trace.finished


def test_snapshots_grow_to_the_last_one(model: fastdllm.Model) -> None:
    *_, trace = watch(model, MESSAGES, gen_length=32, decoder="quota", steps=32, stop_ids=())
    for step in range(len(trace.steps) + 1):
        now = trace.at(step)
        assert now.filled == trace.filled()[step] == step
        assert all(written is None or written <= step for written in now.written)
    assert sorted(trace.at().written) == list(range(1, 33))


def test_saving_and_loading_keeps_everything(model: fastdllm.Model, tmp_path: Path) -> None:
    *_, trace = watch(model, MESSAGES, gen_length=32, constraints={3: 40})
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "other", "version": 1}', '{"format": "fastdllm-trace", "version": 1}']
)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a saved trace"):
        Trace.load(path)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value within a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


WRONG = [-1, 10**12, 1.5, "x", None, True, [], {}, [[1]], "9" * 5000]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:10])
def test_any_changed_value_is_refused_or_shown(model: fastdllm.Model, tmp_path: Path, wrong: Any) -> None:
    """Positions beyond the answer raised an IndexError when they were shown, and negative ones were others' places."""
    *_, trace = watch(model, MESSAGES, gen_length=8, block_length=4, constraints={3: 40})
    path = tmp_path / "trace.json"
    trace.save(path)
    whole = json.loads(path.read_text())
    for place in list(places(whole))[1:]:
        data = copy.deepcopy(whole)
        spot = data
        for key in place[:-1]:
            spot = spot[key]
        spot[place[-1]] = wrong
        path.write_text(json.dumps(data))
        try:
            read = Trace.load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a saved trace: "), place
            continue
        assert len(read.at().ids) == read.length <= 2**24
        assert read.tokens() >= 0 and read.seconds() >= 0 and read.finish_reason in ("stop", "length", None)
        read.save(path)
        assert Trace.load(path) == read


def test_a_trace_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"t\.json is not a saved trace"):
        Trace.load(tmp_path / "t.json")


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_constraint_is_part_of_the_answer_in_every_cache(model: fastdllm.Model, cache: str) -> None:
    # Position 30 lies after where the model ends its answer; the answer must reach it all the same.
    *_, trace = watch(model, MESSAGES, gen_length=48, block_length=16, cache=cache, constraints={0: 40, 30: 50})
    assert trace.answer()[0] == 40 and trace.answer()[30] == 50
    assert trace.at().written[30] == 0
    assert MASK not in trace.answer()


def blank(length: int = 4) -> Trace:
    return Trace("m", {}, prompt_length=2, length=length, mask_id=MASK, stop_ids=(STOP,))


def step(ids: list[int], start: int = 2, done: bool = False) -> Step:
    result = {0: SimpleNamespace(positions=8)} if done else {}
    confidence = torch.full((1, len(ids)), 0.5)
    return Step([0], [start], [start + len(ids)], 0.1, result, torch.tensor([ids]), confidence, torch.zeros(1, len(ids)))


def test_tokens_taken_back_and_rewritten_are_followed() -> None:
    trace = blank()
    trace.add(step([7, MASK, 8, MASK]))
    trace.add(step([MASK, 9, 8, MASK]))
    trace.add(step([5, 6, 8, MASK]))
    assert trace.filled() == [0, 2, 2, 3]
    assert trace.at(1).ids == [7, MASK, 8, MASK]
    assert trace.at(2).ids == [MASK, 9, 8, MASK] and trace.at(2).written == [None, 2, 1, None]
    assert trace.at().ids == [5, 6, 8, MASK] and trace.at().written == [3, 3, 1, None]


def test_a_block_that_begins_inside_the_prompt_is_aligned_to_the_answer() -> None:
    trace = blank()
    block = step([7, 8], start=0)
    block.stops = [4]
    trace.add(block)
    assert trace.steps[0].changes == (Change(0, 7, 0.5), Change(1, 8, 0.5))


def test_steps_of_other_rows_are_passed_over() -> None:
    trace = blank()
    trace.add(step([7, 8, 9, 3]), row=1)
    assert trace.steps == []


def test_tokens_are_counted_up_to_the_end() -> None:
    trace = blank()
    trace.add(step([7, STOP, 8, STOP], done=True))
    assert trace.answer() == [7] and trace.tokens() == 1 and trace.stats().tokens_per_forward == 1


def test_only_one_prompt_can_be_watched(model: fastdllm.Model) -> None:
    with pytest.raises(ValueError, match="one prompt, not 2"):
        next(watch(model, ["a", "b"]))


@pytest.mark.parametrize("fixed", [{3: -1}, {3: 10**9}, {32: 40}, {-1: 40}])
def test_constraints_are_checked_before_they_are_spelt(model: fastdllm.Model, fixed: dict[int, int]) -> None:
    with pytest.raises(ValueError, match=r"^constraint (token|at position)"):
        next(watch(model, MESSAGES, gen_length=32, constraints=fixed))


def test_a_frame_costs_its_own_forward_and_not_the_whole_history(
    model: fastdllm.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = []
    play = Trace._play
    monkeypatch.setattr(Trace, "_play", lambda self, on, a, b: played.append(max(0, b - a + 1)) or play(self, on, a, b))
    for trace in watch(model, MESSAGES, gen_length=32, decoder="quota", steps=32, stop_ids=()):
        trace.at(), trace.answer(), trace.filled()
    assert sum(played) == 32


def test_a_snapshot_stays_as_it_was(model: fastdllm.Model) -> None:
    run = watch(model, MESSAGES, gen_length=32, decoder="quota", steps=32, stop_ids=())
    seen = [next(run).at() for _ in range(4)]
    *_, trace = run
    assert [trace.at(step) for step in range(4)] == seen


def test_a_token_that_is_taken_back_is_open_again() -> None:
    steps = [
        TraceStep(0, 2, 0.1, (Change(0, 7, 0.9), Change(1, 8, 0.8))),
        TraceStep(0, 2, 0.1, (Change(0, MASK, None),)),
        TraceStep(0, 2, 0.1, (Change(0, 9, 0.7),)),
    ]
    trace = Trace("m", {}, 1, 2, MASK, (STOP,), steps=steps)
    assert trace.filled() == [0, 2, 1, 2]
    assert trace.at(2).ids == [MASK, 8] and trace.at(2).written == [None, 1] and trace.at().written == [3, 1]


def test_an_answer_says_why_it_ended(model: fastdllm.Model) -> None:
    for length, reason in ((48, "stop"), (8, "length")):
        for trace in watch(model, MESSAGES, gen_length=length):
            assert trace.finish_reason == (reason if trace.finished else None)
