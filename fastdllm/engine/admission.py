# SPDX-License-Identifier: Apache-2.0
"""Who waits, who gets a place on the canvas, and who leaves."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdllm.decoding import Decoding
from fastdllm.engine.prefixes import prefixes
from fastdllm.engine.row import Place, Request, Result, Row
from fastdllm.engine.source import Source
from fastdllm.fields import LARGEST, LEAST_TEMPERATURE, is_integer, shown
from fastdllm.forward import ALTERNATIVES
from fastdllm.sampling import draws, truncates
from fastdllm.store import UNIT, Canvas, Room, units

if TYPE_CHECKING:
    from fastdllm.models import Model
    from fastdllm.models.spec import ModelSpec

ROWS = 64  # requests of a live source at once, unless the caller says otherwise
STOPS = 16  # stop tokens of a request of a live source at most, unless the run itself has more
SEEDS = (-(2**63), 2**64 - 1)  # what torch's generators take


def check(model: Model, run: Decoding, request: Request) -> None:
    """Raise ValueError, naming the field that is wrong, for a request that this run cannot answer.

    What passes does not raise later, in a round that other requests share. A request of a list may have more stop tokens
    (`room` makes place for them), one of a live source as many as its canvas was made for.
    """
    _check(model, run, request)
    most = max(STOPS, len(run.stop_ids))
    if request.stop_ids is not None and len(request.stop_ids) > most:
        raise ValueError(f"stop_ids has {len(request.stop_ids)} tokens; a request of a live source has at most {most}")


def _check(model: Model, run: Decoding, request: Request) -> None:
    spec, prompt, length = model.spec, request.prompt, request.length
    if not isinstance(prompt, Tensor) or prompt.ndim != 1 or prompt.dtype != torch.long:
        given = f"{prompt.dtype} {list(prompt.shape)}" if isinstance(prompt, Tensor) else shown(prompt)
        raise ValueError(f"a prompt must be token ids [P] of type int64, not {given}")
    _check_integer("gen_length", length)
    if length < 1:
        raise ValueError(f"gen_length={length} must be at least 1")
    if not len(prompt):
        raise ValueError("a prompt is empty; at least one token is needed")
    if len(prompt) + length > spec.max_length:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and gen_length={length} exceed the model's context of {spec.max_length}"
        )
    low, high = torch.stack(prompt.aminmax()).tolist()  # sync: once a request; bad ids would read outside the embedding
    if low < 0 or high >= spec.vocab:
        raise ValueError(f"a prompt has token ids outside 0..{spec.vocab - 1}")
    _check_integer("seed", request.seed)
    if not SEEDS[0] <= request.seed <= SEEDS[1]:
        raise ValueError(f"seed={shown(request.seed)} must lie in [{SEEDS[0]}, {SEEDS[1]}]")
    check_fixed(spec, request.fixed, length)
    _check_stops(spec, request.stop_ids)
    if request.ends is not None and not callable(request.ends):
        raise ValueError(f"ends={shown(request.ends)} must be a function of the answer so far")
    _check_integer("alternatives", request.alternatives)
    if not 0 <= request.alternatives <= ALTERNATIVES:
        raise ValueError(f"alternatives={request.alternatives} must lie in 0..{ALTERNATIVES}")
    if request.alternatives and run.decoder.branches > 1:
        raise ValueError(f"alternatives={request.alternatives} must be 0: the decoder tries branches")
    _check_numbers(run, request.numbers)


def _check_integer(name: str, value: Any) -> None:
    if not is_integer(value):
        raise ValueError(f"{name}={shown(value)} must be of type int")


def _check_stops(spec: ModelSpec, stops: Any) -> None:
    if stops is None:
        return
    if not isinstance(stops, Sequence) or isinstance(stops, str):
        raise ValueError(f"stop_ids={shown(stops)} must be a tuple of token ids")
    for token in stops:
        if not is_integer(token) or not 0 <= token < spec.vocab:
            raise ValueError(f"stop_ids: {shown(token)} is none of the model's token ids, 0 to {spec.vocab - 1}")


def _check_numbers(run: Decoding, own: Any) -> None:
    """Raise ValueError for numbers of a request that are none, or that this run does not know or cannot decode with."""
    if not isinstance(own, Mapping):
        raise ValueError(f"numbers={shown(own)} must be a dict, name: number")
    for name, value in own.items():
        if name not in run.numbers:
            raise ValueError(f"{name}={shown(value)} is not a number of this run; allowed are {', '.join(run.numbers)}")
        if not isinstance(value, Real) or isinstance(value, bool) or not abs(value) <= LARGEST:
            raise ValueError(f"{name}={shown(value)} must be a finite number, and at most {LARGEST:g}")
    numbers = {**run.numbers, **own}
    for name in ("temperature", "top_k", "alg_temp", "cfg_scale"):
        if numbers.get(name, 0) < 0:
            raise ValueError(f"{name}={numbers[name]} must be at least 0")
    for name in ("temperature", "alg_temp"):
        if 0 < numbers.get(name, 0) < LEAST_TEMPERATURE:
            raise ValueError(f"{name}={numbers[name]} must be 0 or at least {LEAST_TEMPERATURE:g}")
    if not 0 < numbers["top_p"] <= 1:
        raise ValueError(f"top_p={numbers['top_p']} must lie in (0, 1]")
    if run.decoder.branches > 1 and run.sampler.random(numbers):
        raise ValueError(
            f"temperature={numbers['temperature']} and alg_temp={numbers['alg_temp']} must be 0: the decoder tries branches"
        )
    run.decoder.checked({name: float(value) for name, value in own.items() if name in run.decoder.per_request})


def check_fixed(spec: ModelSpec, fixed: Any, length: int) -> None:
    """Raise ValueError for tokens to fix that are none, or that lie outside an answer of `length` positions."""
    if not isinstance(fixed, Mapping):
        raise ValueError(f"constraints={shown(fixed)} must be a dict, position: token id")
    for at, token in fixed.items():
        if not is_integer(at) or not 0 <= at < length:
            raise ValueError(f"constraint at position {shown(at)} lies outside the answer, 0..{length - 1}")
        if not is_integer(token) or not 0 <= token < spec.vocab or token == spec.mask_id:
            raise ValueError(f"constraint token {shown(token)} at position {at} is not a token that may be written")


def room(model: Model, source: Source, run: Decoding, rows: int | None, positions: int | None) -> Room:
    """What a run needs. rows: requests at once. positions: slots in all at most, as far as the longest request allows.

    Raises ValueError for a request that is known from the start and cannot be answered.
    """
    spec, known = model.spec, source.known()
    for request in known or ():
        _check(model, run, request)
    if known is None:
        longest = units(spec.max_length + max(run.block_causal, run.block_length) + _shadows(run, spec) + 1)
        rows = rows or ROWS
        total = longest * rows if positions is None else units(positions)
        return Room(longest, 1, max(longest * run.lanes, total), rows, max(STOPS, len(run.stop_ids)))
    sizes = sorted((size_of(request, run, spec) for request in known), reverse=True) or [1]
    rows = max(1, min(rows or len(sizes), len(sizes)))
    total = sum(sizes[:rows]) * run.lanes
    if positions is not None:
        total = max(sizes[0] * run.lanes, min(total, units(positions)))
    stops = max((len(_stops(request, run)) for request in known), default=1)
    return Room(sizes[0], sizes[-1], total, rows, max(4, stops))


def size_of(request: Request, run: Decoding, spec: ModelSpec) -> int:
    """Units of a request's row: its canvas, its shadows and the scratch position."""
    total = len(request.prompt) + request.length
    return units(run.geometry(len(request.prompt), total)[-1].visible_end + _shadows(run, spec) + 1)


def _shadows(run: Decoding, spec: ModelSpec) -> int:
    return run.block_length * (1 + spec.shift) if run.decoder.shadow else 0


def _stops(request: Request, run: Decoding) -> tuple[int, ...]:
    return run.stop_ids if request.stop_ids is None else request.stop_ids


@dataclass(frozen=True)
class Waiting:
    """A request without a place. prefix: see `Row`."""

    number: int
    request: Request
    prefix: list[bytes]


class Desk:
    """Receives requests, gives them places in the order in which they came, and takes the places back.

    live: the rows on the canvas.
    """

    def __init__(self, model: Model, run: Decoding, canvas: Canvas, source: Source) -> None:
        self.model, self.run, self.canvas, self.source = model, run, canvas, source
        self.prefixes = prefixes(model, run, source.known())
        self.waiting: deque[Waiting] = deque()
        self.live: list[Row] = []
        self._count, self._closed = 0, False

    def open(self) -> bool:
        """Between two rounds: receive, withdraw, admit. False when there is nothing left to do."""
        if not self._closed:
            new = self.source.take(idle=not (self.live or self.waiting))
            self._closed = new is None
            for request in new or ():
                if self.source.known() is None:
                    check(self.model, self.run, request)
                prefix = [] if self.prefixes is None else self.prefixes.of(request)
                self.waiting.append(Waiting(self._count, request, prefix))
                self._count += 1
        if gone := set(self.source.withdrawn()):
            self.waiting = deque(item for item in self.waiting if item.number not in gone)
            for row in self.live:
                row.finished = row.finished or row.number in gone
            self._dismiss()
        while self.waiting and self._admit(self.waiting[0]):
            self.waiting.popleft()
        if self.waiting and not self.live:  # it would wait for ever
            raise RuntimeError(f"request {self.waiting[0].number} finds no place on an empty canvas")
        return bool(self.live or self.waiting) or not self._closed

    def settle(self, rows: Sequence[Row]) -> dict[int, Result]:
        """After a forward of `rows`: the results of those that have finished, by number; their places are free again."""
        if self.prefixes is not None:
            for row in rows:
                self.prefixes.keep(self.canvas, row)
        done = {row.number: self._result(row) for row in rows if row.finished}
        self._dismiss()
        return done

    def _dismiss(self) -> None:
        for row in self.live:
            if row.finished:
                self.canvas.places.give(row.place.row)
                self.canvas.slots.append(row.place.slot)
        self.live = [row for row in self.live if not row.finished]

    def _result(self, row: Row) -> Result:
        prompt, total, canvas = len(row.request.prompt), len(row.request.prompt) + row.request.length, self.canvas
        at = row.place.row
        return Result(
            canvas.x[at, :total].clone(),
            canvas.logprobs[at, prompt:total].clone(),
            canvas.committed_at[at, prompt:total].clone(),
            row.cost,
            row.stopped,
        )

    def _admit(self, next_one: Waiting) -> bool:
        """Give the request a place and write it there, if there is room and nothing worth a round's wait."""
        model, run, canvas, request = self.model, self.run, self.canvas, next_one.request
        if self.prefixes is not None and self.prefixes.waits(next_one.prefix, self.live):
            return False
        size = size_of(request, run, model.spec)
        at = canvas.places.take(size, run.lanes) if canvas.slots else None
        if at is None:
            return False
        place = Place(at, size, canvas.slots.pop(), size * UNIT - 1)
        blocks = run.geometry(len(request.prompt), len(request.prompt) + request.length)
        numbers = {**run.numbers, **request.numbers}
        write(canvas, place, run.lanes, request, blocks[-1].visible_end, model.spec)
        write_numbers(canvas, place.slot, list(map(float, numbers.values())), _stops(request, run))
        generator = None
        if run.sampler.random(numbers):
            generator = torch.Generator(model.device).manual_seed(int(request.seed))
        reuse = None if run.reuse is None else run.reuse.cursor()
        row = Row(next_one.number, request, blocks, place, generator, draws(numbers), truncates(numbers), reuse)
        self.live.append(row)
        if self.prefixes is not None:
            row.prefix = next_one.prefix
            self.prefixes.load(canvas, row)
        return True


def write(canvas: Canvas, place: Place, lanes: int, request: Request, end: int, spec: ModelSpec) -> None:
    """Write a request into its lanes: prompt, masks up to `end`, fixed tokens, padding."""
    prompt, total, span = len(request.prompt), len(request.prompt) + request.length, place.size * UNIT

    def own(tensor: Tensor) -> Tensor:
        return tensor.as_strided((lanes, span), (span, 1), tensor.storage_offset() + place.row * UNIT)

    x, masked = own(canvas.x), own(canvas.masked)
    x.fill_(spec.pad_id)
    x[:, :prompt] = _sent(request.prompt, x.device)
    x[:, prompt:end] = spec.mask_id
    masked.fill_(False)
    masked[:, prompt:total] = True
    for offset, token in request.fixed.items():
        x[:, prompt + offset], masked[:, prompt + offset] = token, False
    own(canvas.chosen).copy_(masked)
    own(canvas.logprobs).fill_(torch.nan)
    own(canvas.committed_at).zero_()


def write_numbers(canvas: Canvas, slot: int, numbers: list[float], stops: tuple[int, ...]) -> None:
    """Write what a request brings along."""
    width = canvas.stops.shape[1]
    padded = torch.tensor([*stops, *[-1] * (width - len(stops))])
    canvas.stops[slot] = _sent(padded, canvas.stops.device)
    canvas.numbers[slot, : len(numbers)] = _sent(torch.tensor(numbers, dtype=torch.float32), canvas.numbers.device)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, without waiting for the device."""
    return x if x.device == device or device.type != "cuda" else x.pin_memory().to(device, non_blocking=True)
