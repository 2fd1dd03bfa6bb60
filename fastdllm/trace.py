# SPDX-License-Identifier: Apache-2.0
"""One answer as it came to be: which token was written where, in which forward and how sure the model was.

The chat, the page, the notebooks and `scripts/studies/plot_trace.py` all show this, live (`watch`) or from a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdllm import whole
from fastdllm.config import DecodeConfig
from fastdllm.engine import Step, check_fixed
from fastdllm.fields import shown
from fastdllm.generation import merged, prompts_of, stream, tokens_to_fix
from fastdllm.models import Model
from fastdllm.prompts import Prompts, encode
from fastdllm.stats import Stats

FORMAT, VERSION = "fastdllm-trace", 1
LONGEST = 2**24  # positions of an answer in a file; more would fill the memory


@dataclass(frozen=True)
class Change:
    """A token written at a position of the answer.

    position: in the answer, from 0.
    token: its id; the mask id where the position was masked again.
    confidence: probability in [0, 1], or the decoder's own measure; None where the position was not scored in that forward.
    """

    position: int
    token: int
    confidence: float | None


@dataclass(frozen=True)
class TraceStep:
    """One forward.

    start, stop: its block [start, stop), in positions of the answer.
    seconds: how long it took.
    changes: what it wrote there.
    """

    start: int
    stop: int
    seconds: float
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Snapshot:
    """The answer of N positions after some forward.

    ids: the tokens; the mask id where a position is open.
    written: the forward that wrote each token, from 1; 0 for a constraint, None where open.
    confidence: with which the token was written; None where open or unknown.
    """

    ids: list[int]
    written: list[int | None]
    confidence: list[float | None]

    @property
    def filled(self) -> int:
        return sum(step is not None for step in self.written)


@dataclass
class Trace:
    """The history of one answer.

    model, config: which model answered, under which options.
    prompt_length, length: tokens of the prompt, positions of the answer.
    mask_id, stop_ids: ids of the model.
    fixed: constraints, token by position.
    steps: one entry per forward.
    texts: what the tokens that occur look like, by id.
    finished: False for an answer that was stopped from outside.
    positions: how many the forwards recomputed.
    """

    model: str
    config: dict[str, Any]
    prompt_length: int
    length: int
    mask_id: int
    stop_ids: tuple[int, ...]
    fixed: dict[int, int] = field(default_factory=dict)
    steps: list[TraceStep] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    finished: bool = False
    positions: int = 0

    def __post_init__(self) -> None:
        self._now, self._curve = self._start(), [len(self.fixed)]

    def _start(self) -> Snapshot:
        """The answer before the first forward."""
        start = Snapshot([self.mask_id] * self.length, [None] * self.length, [None] * self.length)
        for position, token in self.fixed.items():
            start.ids[position], start.written[position] = token, 0
        return start

    def _play(self, on: Snapshot, first: int, last: int) -> Iterator[int]:
        """Carry out the forwards from `first` (counted from 1) to `last`; yields how many positions each one gained."""
        for number in range(first, last + 1):
            gained = 0
            for change in self.steps[number - 1].changes:
                open_again = change.token == self.mask_id
                gained += (on.written[change.position] is None) - open_again
                on.ids[change.position] = change.token
                on.written[change.position] = None if open_again else number
                on.confidence[change.position] = None if open_again else change.confidence
            yield gained

    def _catch_up(self) -> Snapshot:
        """The answer now: kept from step to step, since every redraw asks for it."""
        for gained in self._play(self._now, len(self._curve), len(self.steps)):
            self._curve.append(self._curve[-1] + gained)
        return self._now

    @property
    def finish_reason(self) -> str | None:
        """ "stop" for an answer that ended by itself, "length" for one that was cut at its length, None for one that was
        stopped or is not finished."""
        if not self.finished:
            return None
        return "stop" if len(self.answer()) < self.length else "length"

    def add(self, step: Step, row: int = 0, spell: Callable[[int], str] = str) -> None:
        """Take in a step of `fastdllm.stream` that served request `row`; one that did not is passed over.

        spell: a token id -> its text.
        """
        if row not in step.rows:
            return
        i, now = step.rows.index(row), self._catch_up()
        # The first block of a v2 answer may begin inside the prompt; a step's ids begin at the first position of the answer.
        start = max(step.starts[i], self.prompt_length) - self.prompt_length
        stop = step.stops[i] - self.prompt_length
        ids, confidence = step.ids[i].tolist(), step.confidence[i].tolist()
        changes = tuple(
            Change(p, ids[p - start], None if confidence[p - start] != confidence[p - start] else confidence[p - start])
            for p in range(start, stop)
            if ids[p - start] != now.ids[p]
        )
        for token in {change.token for change in changes} - self.texts.keys():
            self.texts[token] = spell(token)
        self.steps.append(TraceStep(start, stop, step.seconds, changes))
        if row in step.done:
            self.finished, self.positions = True, step.done[row].positions

    def at(self, step: int | None = None) -> Snapshot:
        """The answer after `step` forwards; default: now."""
        last = len(self.steps[:step])
        now = self._catch_up() if last == len(self.steps) else self._start()
        out = Snapshot(list(now.ids), list(now.written), list(now.confidence))
        if last < len(self.steps):
            for _ in self._play(out, 1, last):
                pass
        return out

    def answer(self, step: int | None = None) -> list[int]:
        """The ids before the end, open positions (mask ids) included. The end is the first stop token after the last
        constraint: what was asked for belongs to the answer."""
        ids, asked = self.at(step).ids, max(self.fixed, default=-1)
        ends = [i for i, token in enumerate(ids) if token in self.stop_ids and i > asked]
        return ids[: ends[0]] if ends else ids

    def filled(self) -> list[int]:
        """Positions that hold a token after 0, 1, 2, ... forwards: the acceptance curve."""
        self._catch_up()
        return list(self._curve)

    def seconds(self, step: int | None = None) -> float:
        return sum(done.seconds for done in self.steps[:step])

    def tokens(self, step: int | None = None) -> int:
        """Tokens written before the end, stop tokens before a constraint left out."""
        return sum(token != self.mask_id and token not in self.stop_ids for token in self.answer(step))

    def stats(self) -> Stats:
        return Stats(
            forwards=len(self.steps),
            seconds=self.seconds(),
            row_forwards=[len(self.steps)],
            row_positions=[self.positions],
            row_tokens=[self.tokens()],
        )

    def save(self, path: str | Path) -> None:
        """Write the trace as JSON: the fields above, each change as [position, token, confidence]."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        data["steps"] = [
            {
                "start": step.start,
                "stop": step.stop,
                "seconds": step.seconds,
                "changes": [[c.position, c.token, c.confidence] for c in step.changes],
            }
            for step in self.steps
        ]
        whole.write_text(path, json.dumps(data, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a file that `save` wrote; ValueError for any other."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            kind = data.pop("format"), data.pop("version")
            if kind != (FORMAT, VERSION):
                raise ValueError(f"its format is {kind[0]} version {kind[1]}, expected {FORMAT} version {VERSION}")
            data["steps"] = [
                TraceStep(s["start"], s["stop"], s["seconds"], tuple(Change(*c) for c in s["changes"]))
                for s in data["steps"]
            ]
            for name in ("fixed", "texts"):
                data[name] = {int(k): v for k, v in data[name].items()}
            data["stop_ids"] = tuple(data["stop_ids"])
            _check(data)
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            where = path if isinstance(path, str | Path) else shown(path)
            raise ValueError(f"{where} is not a saved trace: {error}") from error


def _check(data: Mapping[str, Any]) -> None:
    """ValueError for fields of a saved trace that no answer has, which would be shown as another answer or not at all."""

    def whole(*values: Any) -> bool:
        return all(type(value) is int and value >= 0 for value in values)

    def number(*values: Any) -> bool:
        return all(type(value) in (int, float) and math.isfinite(value) for value in values)

    length, steps, changes = data["length"], data["steps"], [c for step in data["steps"] for c in step.changes]
    sizes = (length, data["prompt_length"], data["mask_id"], data.get("positions", 0), *data["stop_ids"])
    if not whole(*sizes) or length > LONGEST:
        raise ValueError("a length or an id is no whole number, or out of range")
    placed = [*data["fixed"].items(), *((c.position, c.token) for c in changes)]
    if not all(whole(*pair) and pair[0] < length for pair in placed):
        raise ValueError(f"a token stands outside of an answer of {length} positions, or is none")
    if not all(type(s.start) is type(s.stop) is int and number(s.seconds) and s.seconds >= 0 for s in steps):
        raise ValueError("a step's positions or seconds are no numbers")
    if not all(c.confidence is None or number(c.confidence) for c in changes):
        raise ValueError("a confidence is no number")
    texts = (data["model"], *data["texts"].values())
    if not all(isinstance(text, str) for text in texts) or type(data["config"]) is not dict:
        raise ValueError("a text or the settings are of another type")
    if type(data.get("finished", False)) is not bool:
        raise ValueError("finished is neither true nor false")


def watch(
    model: Model,
    prompt: Prompts | None = None,
    config: DecodeConfig | None = None,
    *,
    constraints: dict[int, int] | None = None,
    attention_mask: Any = None,
    **options: Any,
) -> Iterator[Trace]:
    """Answer one prompt and yield its trace before the first forward and after each one (the same object, growing).

    Takes the arguments of `fastdllm.generate`, for a single prompt, and raises its errors, before anything is iterated.
    Closing the iterator stops the computation.
    """
    options = dict(options)
    prompt = prompts_of(prompt, options)
    config = merged(config, options)
    ids: list[Tensor] = encode(model, prompt, attention_mask)
    if len(ids) != 1:
        raise ValueError(f"watch follows one prompt, not {len(ids)}")
    stop_ids = model.spec.stop_ids if config.stop_ids is None else config.stop_ids
    [fixed] = tokens_to_fix(constraints, 1)
    check_fixed(model.spec, fixed, config.gen_length)
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in config.given().items() if v is not None}
    trace = Trace(model.name, options, len(ids[0]), config.gen_length, model.spec.mask_id, stop_ids, fixed)
    trace.texts = {token: spell(model, token) for token in fixed.values()}
    return _growing(trace, model, stream(model, ids, config, constraints=fixed))


def _growing(trace: Trace, model: Model, steps: Generator[Step, None, None]) -> Iterator[Trace]:
    with closing(steps):
        yield trace
        for step in steps:
            trace.add(step, spell=lambda token: spell(model, token))
            yield trace


def spell(model: Model, token: int) -> str:
    """The text of one token; its number where the model has no tokenizer. Part of a character decodes to U+FFFD."""
    return model.tokenizer.decode([token]) if model.tokenizer is not None else str(token)
