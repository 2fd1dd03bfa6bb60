# SPDX-License-Identifier: Apache-2.0
"""Logits -> the token each position would take, and how confident the model is in it.

The confidence is always taken from the untempered, untruncated distribution in fp32. Taken after tempering it makes a
threshold meaningless: at temperature 0.1 flat logits look certain (dLLM-RL issue 5: Dream's HumanEval 55.5 -> 1.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdllm import kernels

CONFIDENCES = ("probability", "margin", "entropy", "random")


@dataclass(frozen=True)
class Scores:
    """What the sampler makes of the logits.

    top: [R, Q] int64, the token that each position would take.
    conf: [R, Q] fp32, its confidence.
    logprob: [R, Q] fp32, its log-probability, untempered.
    entropy, margin: [R, Q] fp32, or None; entropy in nats.
    """

    top: Tensor
    conf: Tensor
    logprob: Tensor
    entropy: Tensor | None
    margin: Tensor | None


@dataclass(frozen=True)
class Sampler:
    """How the logits of a position become a token and a confidence.

    confidence: "probability" of the chosen token, "margin" (best minus second), "entropy" (negative), or "random".
    temperature: 0 takes the most likely token. Above, the token is drawn from softmax(logits / temperature), by adding
        Gumbel noise and taking the maximum (the same distribution as a multinomial draw, with a static shape).
    top_p: draws from the smallest set of tokens whose probability reaches it; None for all.
    top_k: draws from so many most likely tokens; None for all.
    alg_temp: Dream's randomness in the choice of positions: they are drawn without replacement in proportion to
        softmax(confidence / alg_temp).
    needs: further statistics that the decoder asks for, of {"entropy", "margin"}.
    drawn, truncated: whether some row draws its token, and leaves out unlikely ones; read off the numbers if not given.

    The numbers may be columns [R, 1] of the rows' own values (`of`).
    """

    confidence: str = "probability"
    temperature: float | Tensor = 0.0
    top_p: float | Tensor | None = None
    top_k: int | Tensor | None = None
    alg_temp: float | Tensor = 0.0
    needs: frozenset[str] = frozenset()
    drawn: bool | None = None
    truncated: bool | None = None

    def __post_init__(self) -> None:
        if self.drawn is None:
            object.__setattr__(self, "drawn", draws(self.numbers))
            object.__setattr__(self, "truncated", truncates(self.numbers))

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers that a request may bring along, with this sampler's values; top_p 1 and top_k 0 are none."""
        top_p = 1.0 if self.top_p is None else self.top_p
        return {
            "temperature": float(self.temperature),
            "top_p": float(top_p),
            "top_k": float(self.top_k or 0),
            "alg_temp": float(self.alg_temp),
        }

    def of(self, numbers: Mapping[str, Tensor], drawn: bool, truncated: bool) -> Sampler:
        """This sampler with the rows' own numbers, columns [R, 1]."""
        own = {name: numbers[name] for name in ("temperature", "top_p", "top_k", "alg_temp")}
        return replace(self, **own, drawn=drawn, truncated=truncated)

    def random(self, numbers: Mapping[str, float]) -> bool:
        """Whether a request with these numbers needs noise."""
        return draws(numbers) or self.confidence == "random" or numbers["alg_temp"] > 0

    def draw(
        self,
        generators: Sequence[torch.Generator | None],
        width: int,
        vocab: int,
        drawn: Sequence[bool] | None = None,
        widths: Sequence[int] | None = None,
    ) -> Tensor | None:
        """Uniform noise [R, width, n] for one step, one draw per row from its own generator.

        generators: None for a row that is not random; its noise means nothing. drawn: whether each row draws tokens, which
        takes `vocab` numbers per position besides the one for its place; by default all do if this sampler does. widths:
        positions that each row draws for, by default all; what it draws then depends on no other row and on no longer block
        of the run. None when nothing is random.
        """
        if all(g is None for g in generators):
            return None
        drawn = [bool(self.drawn)] * len(generators) if drawn is None else drawn
        columns = (vocab if any(drawn) else 0) + 1
        rows = []
        for g, tokens, own_width in zip(generators, drawn, widths or [width] * len(generators), strict=True):
            own = None if g is None else torch.rand(own_width, vocab * tokens + 1, generator=g, device=g.device)
            rows.append(own)
        device = next(row.device for row in rows if row is not None)
        idle = torch.full((width, columns), 0.5, device=device)
        return torch.stack([_widened(row, idle) for row in rows])

    @property
    def statistics(self) -> dict[str, bool]:
        """What `kernels.confidence` computes besides the top token and its probability."""
        return {name: name in self.needs or self.confidence == name for name in ("entropy", "margin")}

    def __call__(self, logits: Tensor, banned: Tensor, noise: Tensor | None) -> Scores:
        """logits [R, Q, V] -> scores of every position; banned [V] ids get probability 0."""
        stats = kernels.confidence(logits.flatten(0, 1), banned, **self.statistics)
        raw = logits.float().masked_fill(banned, -torch.inf) if self.drawn else None
        return self.scores(stats, logits.shape[:2], noise, raw)

    def scores(
        self, stats: kernels.Confidence, shape: torch.Size, noise: Tensor | None, logits: Tensor | None = None
    ) -> Scores:
        """Scores of shape [R, Q] from `stats` [R * Q]; a temperature draws from logits [R, Q, V] fp32, -inf where banned."""
        top, prob, lse, entropy, margin = (None if x is None else x.view(shape) for x in stats)
        logprob = prob.log()
        gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7))) if noise is not None else None
        if self.drawn:
            temperature = _column(self.temperature, prob)
            drawing = temperature > 0
            tempered = self._truncate(logits / torch.where(drawing, temperature, 1)[..., None])
            top = torch.where(drawing, (tempered + gumbel[..., :-1]).argmax(-1), top)
            logprob = torch.where(drawing, logits.gather(-1, top[..., None])[..., 0] - lse, logprob)
            prob = torch.where(drawing, logprob.exp(), prob)
        conf = {
            "probability": prob,
            "margin": margin,
            "entropy": -entropy if entropy is not None else None,
        }.get(self.confidence)
        if self.confidence == "random":
            conf = noise[..., -1]
        if noise is not None:
            alg_temp = _column(self.alg_temp, prob)
            conf = torch.where(alg_temp > 0, conf / torch.where(alg_temp > 0, alg_temp, 1) + gumbel[..., -1], conf)
        return Scores(top, conf, logprob, entropy, margin)

    def probability(self, logits: Tensor, ids: Tensor, banned: Tensor) -> Tensor:
        """logits [R, Q, V] -> the probability of ids [R, Q], fp32 [R, Q], untempered as every confidence is."""
        lse = kernels.confidence(logits.flatten(0, 1), banned).lse.view_as(ids)
        return (logits.gather(-1, ids[..., None])[..., 0].float() - lse).exp()

    def _truncate(self, logits: Tensor) -> Tensor:
        """-inf outside the top-k and the nucleus of logits [R, Q, V]; the most likely token always stays."""
        if not self.truncated:
            return logits
        top_k = _column(0 if self.top_k is None else self.top_k, logits)[..., None]
        top_p = _column(1.0 if self.top_p is None else self.top_p, logits)[..., None]
        values, order = logits.sort(-1, descending=True)
        last = torch.where(top_k > 0, top_k, logits.shape[-1]).clamp(max=logits.shape[-1]).long() - 1
        kth = values.gather(-1, last.expand(*values.shape[:-1], 1))
        share = values.masked_fill(values < kth, -torch.inf).softmax(-1)
        outside = (share.cumsum(-1) - share >= top_p) & (top_p < 1)
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, outside)
        return logits.masked_fill(outside | (logits < kth), -torch.inf)


def draws(numbers: Mapping[str, float]) -> bool:
    """Whether tokens are drawn."""
    return numbers["temperature"] > 0


def truncates(numbers: Mapping[str, float]) -> bool:
    """Whether tokens are drawn from the likely ones only."""
    return draws(numbers) and (numbers["top_k"] > 0 or numbers["top_p"] < 1)


def guide(given: Tensor, free: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): logits with the prompt, moved away from those without it."""
    return free + (scale + 1) * (given - free)


def _column(number: float | Tensor, like: Tensor) -> Tensor:
    return number if isinstance(number, Tensor) else like.new_full((1, 1), number)


def _widened(row: Tensor | None, idle: Tensor) -> Tensor:
    """Noise of a row in the shape of all: of the columns what it does not need comes first, of the positions last."""
    if row is None or row.shape == idle.shape:
        return idle if row is None else row
    row = torch.cat([idle[: len(row), : idle.shape[1] - row.shape[1]], row], 1)
    return torch.cat([row, idle[len(row) :]])
