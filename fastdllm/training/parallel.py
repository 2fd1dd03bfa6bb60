# SPDX-License-Identifier: Apache-2.0
"""Teaching a model to decode in fewer forwards, on its own answers and on the states in which decoding meets them.

A masked-diffusion model learns from masks drawn at random; a decoder asks it about other states: blocks that were opened
fully masked, then filled in the model's own order of confidence. What makes decoding slow is that the model is unsure where
it is already right. So each sample is shown in a state of the second kind, and the loss has two parts:

    cross-entropy on every mask of the block, and the entropy of the prediction where it is right already.

The entropy term and block-wise masks are dParallel's (certainty-forcing distillation, arXiv 2509.26488); masks in the order
of a recorded trajectory and a curriculum over block length and mask share are d3LLM's (arXiv 2601.07568). A third kind of
state is made as training goes: a few forwards of the present weights fill what they are sure of and right about, so that the
model practises on the states that it will meet after this training, not before it.

Every family: bidirectional models see one block of each sample, with all before it known and all after it masked;
block-causal ones see all blocks at once, each as noise together with its clean past.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from fastdllm import whole
from fastdllm.models.spec import ModelSpec
from fastdllm.training.finite import FiniteTrainer
from fastdllm.training.masks import PADDING, dense_mask

UNKNOWN = -1.0  # order of a token of which no trajectory tells when it was committed
TAIL_WEIGHT = 0.1  # of an end token after the first: easy, many, and decoding stops before them
WIDTH_STEP = 64  # rows are padded to a multiple, so that few shapes occur


class Example(NamedTuple):
    """A prompt, its answer up to and with the end token, and when each answer token was committed (empty: unknown)."""

    prompt: Sequence[int]
    answer: Sequence[int]
    order: Sequence[int] = ()


class Batch(NamedTuple):
    """ids [B, T] int64, the answer followed by end tokens; order [B, T] fp32. Per row [B]: where the answer starts, its
    tokens with the first end token (`content`), and where the canvas stops."""

    ids: Tensor
    order: Tensor
    start: Tensor
    content: Tensor
    stop: Tensor


@dataclass(frozen=True)
class Collator:
    """Examples to a batch. The canvas after a prompt has `canvas` tokens, or, for a quarter of the rows, fewer: callers ask
    for answers of any length. An example without room for one is left out. grid: the blocks of a block-causal model, whose
    last one is always whole."""

    end_id: int
    canvas: int
    context: int
    grid: int = 0
    full_share: float = 0.75

    def fits(self, example: Example) -> bool:
        room = min(self.canvas, self.context - len(example.prompt))
        return len(example.prompt) > 0 and 0 < len(example.answer) <= room

    def __call__(self, examples: Sequence[Example | None]) -> dict[str, Tensor]:
        kept = [e for e in examples if e is not None and self.fits(e)]
        if not kept:
            raise ValueError(f"no example of this batch fits a canvas of {self.canvas} tokens in {self.context}")
        stops = []
        for e in kept:
            longest = min(self.canvas, self.context - len(e.prompt))
            drawn = longest if random.random() < self.full_share else random.randint(len(e.answer), longest)
            stop = len(e.prompt) + drawn
            stops.append(-(-stop // self.grid) * self.grid if self.grid else stop)
        width = -(-max(stops) // WIDTH_STEP) * WIDTH_STEP
        ids = torch.full((len(kept), width), self.end_id)
        order = torch.full((len(kept), width), UNKNOWN)
        for b, e in enumerate(kept):
            start, after = len(e.prompt), len(e.prompt) + len(e.answer)
            ids[b, :after] = torch.tensor([*e.prompt, *e.answer])
            if len(e.order):
                order[b, start:after] = torch.tensor(e.order, dtype=torch.float)
                order[b, after:] = max(e.order) + 1.0
        start = torch.tensor([len(e.prompt) for e in kept])
        content = torch.tensor([len(e.answer) for e in kept])
        return Batch(ids, order, start, content, torch.tensor(stops))._asdict()


@dataclass(frozen=True)
class Curriculum:
    """What is drawn at which part of the run, `progress` in [0, 1].

    blocks: block lengths, short ones first; all are in play from `ramp` of the run on, half of the rows with the longest
    so far. share: the largest mask share at the start, growing to 1. own, recorded: parts of the rows that start from a
    full block and are filled by the present weights, and that follow a recorded order; the others are masked at random.
    forwards: at most so many fill an `own` row; each fills what it is right about at `threshold`.
    """

    blocks: tuple[int, ...] = (32, 64, 128)
    share: float = 0.5
    ramp: float = 0.3
    own: float = 0.5
    recorded: float = 0.25
    forwards: int = 3
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(f"blocks={self.blocks} must be block lengths of at least 1")
        for name in ("share", "ramp", "own", "recorded", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be within 0..1")
        if self.own + self.recorded > 1:
            raise ValueError(f"own={self.own} and recorded={self.recorded} are shares of one whole")

    def reach(self, progress: float) -> float:
        """How much of the curriculum is open, in [0, 1]."""
        return min(1.0, progress / self.ramp) if self.ramp else 1.0

    def lengths(self, progress: float, rows: int, generator: torch.Generator) -> Tensor:
        """[B] block lengths."""
        open_ = max(1, math.ceil(self.reach(progress) * len(self.blocks)))
        device = generator.device
        lengths = torch.tensor(self.blocks[:open_], device=device)
        any_ = lengths[torch.randint(open_, (rows,), generator=generator, device=device)]
        return torch.where(torch.rand(rows, generator=generator, device=device) < 0.5, lengths[-1], any_)

    def largest_share(self, progress: float) -> float:
        return self.share + (1 - self.share) * self.reach(progress)


class State(NamedTuple):
    """Samples as a decoder meets them. masked [B, T]: what the model is asked for. hidden [B, T]: masks of later blocks.
    anchored [B, T]: targets that a block-causal model predicts from its clean past, before their block is opened."""

    masked: Tensor
    hidden: Tensor
    anchored: Tensor
    own: Tensor


def draw_state(batch: Batch, spec: ModelSpec, curriculum: Curriculum, progress: float, generator: torch.Generator) -> State:
    """A state of each row; nothing is read on the host. Each row has at least one mask."""
    rows, width = batch.ids.shape
    device = batch.ids.device
    place = torch.arange(width, device=device).expand(rows, width)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    start, stop = batch.start[:, None], batch.stop[:, None]
    answer = (place >= start) & (place < stop)
    if spec.block_causal:
        low = place // spec.block_causal * spec.block_causal
        high, inside = low + spec.block_causal, answer & (place % spec.block_causal != 0)
        anchored = answer & ~inside
        share = uniform(rows, width).gather(1, low.clamp_max(width - 1))
    else:
        length = curriculum.lengths(progress, rows, generator)
        blocks = -(-batch.content // length)
        low = (batch.start + (uniform(rows) * blocks).long().clamp_max(blocks - 1) * length)[:, None]
        high = low + length[:, None]
        inside, anchored = answer & (place >= low) & (place < high), torch.zeros_like(answer)
        share = uniform(rows, 1)
    share = share * curriculum.largest_share(progress)

    kind = uniform(rows, 1)
    own = kind < curriculum.own
    known = (batch.order != UNKNOWN).any(1, keepdim=True)
    recorded = (kind < curriculum.own + curriculum.recorded) & ~own & known
    coin = uniform(rows, width)
    # Rank of each position in its block by when it was committed; ties, committed together, in any order.
    key = torch.where(inside, batch.order + coin, float("inf"))
    rank = key.argsort(1).argsort(1) - _before(inside, low)
    count = _before(inside, high) - _before(inside, low)
    late = rank >= ((1 - share) * count).floor()
    masked = inside & torch.where(own, True, torch.where(recorded, late, coin < share))
    last = inside & (torch.where(inside, coin, -1.0) == torch.where(inside, coin, -1.0).amax(1, keepdim=True))
    masked = torch.where(masked.any(1, keepdim=True), masked, last)
    hidden = torch.zeros_like(answer) if spec.block_causal else answer & (place >= high)
    return State(masked, hidden, anchored, own[:, 0])


def _before(inside: Tensor, place: Tensor) -> Tensor:
    """How many positions of `inside` [B, T] come before `place` [B, T or 1]."""
    counts = F.pad(inside.long().cumsum(1), (1, 0))
    return counts.gather(1, place.clamp_max(inside.shape[1]))


class Asked(NamedTuple):
    """Inputs of the network's forward, and of each asked token [N]: its row, its place, its id and its weight."""

    inputs: dict[str, Tensor]
    row: Tensor
    place: Tensor
    target: Tensor
    weight: Tensor


def ask(batch: Batch, state: State, spec: ModelSpec) -> Asked:
    """What to run for a state, and what it is asked for."""
    rows, width = batch.ids.shape
    device = batch.ids.device
    place = torch.arange(width, device=device).expand(rows, width)
    noisy = batch.ids.masked_fill(state.masked | state.hidden, spec.mask_id)
    inside = place < batch.stop[:, None]
    row, at = (state.masked | state.anchored).nonzero(as_tuple=True)  # sync: how many tokens are asked for
    if spec.block_causal:
        visible = dense_mask(place, torch.where(inside, 0, PADDING), spec.block_causal)
        inputs = {"ids": torch.cat([noisy, batch.ids], 1), "positions": place.repeat(1, 2), "visible": visible}
        stream = torch.where(state.anchored[row, at], width, 0)
    else:
        inputs, stream = {"ids": noisy, "positions": place, "visible": inside[:, None, None]}, 0
    inputs["rows"] = row * inputs["ids"].shape[1] + stream + (at - spec.shift).clamp_min(0)
    weight = state.masked.sum(1).clamp_min(1).rsqrt()[row]  # between equal rows and equal tokens
    weight = weight * torch.where(at < (batch.start + batch.content)[row], 1.0, TAIL_WEIGHT)
    return Asked(inputs, row, at, batch.ids[row, at], weight)


@torch.no_grad()
def fill(network: nn.Module, batch: Batch, state: State, spec: ModelSpec, threshold: float) -> State:
    """The state one forward later: `own` rows have the tokens that the network is right and sure about, at least the surest
    that it is right about. A row that would be finished stays as it was."""
    asked = ask(batch, state, spec)
    confidence, token = network(**asked.inputs).float().softmax(-1).max(-1)
    right = (token == asked.target) & state.masked[asked.row, asked.place]
    scores = torch.zeros(batch.ids.shape, device=batch.ids.device)
    scores[asked.row, asked.place] = torch.where(right, confidence, 0.0)
    surest = (scores == scores.amax(1, keepdim=True)) & (scores > 0)
    left = state.masked & ~((scores > threshold) | surest)
    changes = state.own[:, None] & left.any(1, keepdim=True)
    return state._replace(masked=torch.where(changes, left, state.masked))


class Loss(NamedTuple):
    """loss: what is minimised. Of the targets, weighted: cross-entropy, entropy where right, and how many are right."""

    loss: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    right: Tensor


def parallel_loss(logits: Tensor, target: Tensor, weight: Tensor, certainty: float, temperature: float) -> Loss:
    """Cross-entropy of logits [N, V] and `certainty` times the entropy, at `temperature`, where they are right already."""
    logits = logits.float()
    losses = F.cross_entropy(logits, target, reduction="none")
    right = logits.argmax(-1) == target
    logs = (logits / temperature).log_softmax(-1)
    entropies = torch.where(right, -(logs.exp() * logs).sum(-1), 0.0)
    share = weight / weight.sum()
    parts = [(share * part).sum() for part in (losses, entropies, right)]
    return Loss(parts[0] + certainty * parts[1], *parts)


class Clock(TrainerCallback):
    """How much of the run is over: by seconds spent training, those of earlier sessions included, or by steps.

    seconds: of the whole run, None to count steps. session: seconds after which this session saves and stops, None for no
    limit. All processes go by the first one's clock.
    """

    def __init__(self, seconds: float | None, session: float | None, before: float = 0.0) -> None:
        self.seconds, self.session, self.before = seconds, session, before
        self.began, self.progress = time.monotonic(), 0.0

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.began

    def _agree(self, value: float, device: torch.device) -> float:
        if not torch.distributed.is_initialized():
            return value
        told = torch.tensor([value], device=device)
        torch.distributed.broadcast(told, 0)
        return float(told)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = self.spent / self.seconds if self.seconds else state.global_step / max(1, state.max_steps)
        self.progress = min(1.0, self._agree(done, args.device))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        over = self.session is not None and self.spent - self.before >= self.session
        if self._agree(float(over), args.device) or (self.seconds and self.progress >= 1):
            control.should_training_stop = control.should_save = True


class ParallelTrainer(FiniteTrainer):
    """Trains a `Network`, bare or under peft, on batches of `Collator`, by the state that `Curriculum` draws."""

    def __init__(
        self,
        *args: Any,
        spec: ModelSpec,
        curriculum: Curriculum,
        clock: Clock,
        certainty: float,
        temperature: float,
        warm_up: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if spec.causal_context:
            raise ValueError(f"the family {spec.family!r} reads its context causally, which this training does not do")
        super().__init__(*args, **kwargs)
        self.spec, self.curriculum, self.clock, self.warm_up = spec, curriculum, clock, warm_up
        self.certainty, self.temperature = certainty, temperature
        self.model_accepts_loss_kwargs = False
        self.sums: list[Tensor] = []
        self.add_callback(clock)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Draw the states, let the present weights fill some of them, and score what is left."""
        step, seed = self.state.global_step, self.args.seed
        batch, device = Batch(**inputs), inputs["ids"].device
        generator = torch.Generator(device).manual_seed(hash((seed, step, self.args.process_index)) % 2**62)
        state = draw_state(batch, self.spec, self.curriculum, self.clock.progress, generator)
        # As many forwards in every process: under FSDP each gathers weights from all.
        for _ in range(random.Random(hash((seed, step))).randint(0, self.curriculum.forwards)):
            state = fill(model, batch, state, self.spec, self.curriculum.threshold)
        asked = ask(batch, state, self.spec)
        loss = parallel_loss(model(**asked.inputs), asked.target, asked.weight, self.certainty, self.temperature)
        self.sums.append(torch.stack([part.detach() for part in loss[1:]]))
        return loss.loss

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Linear warm-up, then a cosine to 2 % of the peak, over the clock's progress."""

        def rate(step: int) -> float:
            done = self.clock.progress
            cosine = 0.5 + 0.5 * math.cos(math.pi * max(0.0, (done - self.warm_up) / (1 - self.warm_up)))
            return max(min((done + 1e-3) / self.warm_up, 1.0) * cosine, 0.02)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the parts of the loss since the last line."""
        if self.sums and "loss" in logs:
            names = ("cross_entropy", "entropy", "right")
            means = torch.stack(self.sums).mean(0).tolist()
            logs = {**logs, **{name: round(mean, 4) for name, mean in zip(names, means, strict=True)}}
            logs["progress"] = round(self.clock.progress, 4)
            self.sums = []
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Checkpoints remember how much time is spent."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            whole.write_text(folder / "spent.json", f"{self.clock.spent:.1f}\n")
