# SPDX-License-Identifier: Apache-2.0
"""Logits -> the token each position would take, and how confident the model is in it.

The confidence is always taken from the untempered, untruncated distribution in fp32. Taken after tempering it makes a
threshold meaningless: at temperature 0.1 flat logits look certain (dLLM-RL issue 5: Dream's HumanEval 55.5 -> 1.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdllm import kernels

CONFIDENCES = ("probability", "margin", "entropy", "random")


@dataclass(frozen=True)
class Scores:
    """top [R, Q] int64, conf [R, Q] fp32; entropy (nats), margin [R, Q] fp32 or None."""

    top: Tensor
    conf: Tensor
    entropy: Tensor | None
    margin: Tensor | None


@dataclass(frozen=True)
class Sampler:
    """temperature 0 takes the most likely token. Above, the token is drawn from softmax(logits / temperature), cut to the
    `top_k` most likely tokens and to the smallest set whose probability reaches `top_p`, by adding Gumbel noise and taking
    the maximum (the same distribution as a multinomial draw, with a static shape).

    confidence: "probability" of the chosen token, "margin" (best minus second), "entropy" (negative), or "random".
    alg_temp: Dream's randomness in the choice of positions: they are drawn without replacement in proportion to
    softmax(confidence / alg_temp).
    """

    confidence: str = "probability"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float = 0.0
    needs: frozenset[str] = frozenset()

    @property
    def random(self) -> bool:
        return self.temperature > 0 or self.confidence == "random" or self.alg_temp > 0

    def draw(self, generators: list[torch.Generator], width: int, vocab: int) -> Tensor | None:
        """Uniform noise [R, width, n] for one step, one draw per row from its own generator; None when nothing is random."""
        if not self.random:
            return None
        columns = (vocab if self.temperature > 0 else 0) + 1
        return torch.stack(
            [torch.rand(width, columns, generator=g, device=g.device, dtype=torch.float32) for g in generators]
        )

    @property
    def statistics(self) -> dict[str, bool]:
        """What `kernels.confidence` computes beside the top token and its probability."""
        return {name: name in self.needs or self.confidence == name for name in ("entropy", "margin")}

    def __call__(self, logits: Tensor, banned: Tensor, noise: Tensor | None) -> Scores:
        """logits [R, Q, V] -> scores of every position; banned [V] ids get probability 0."""
        stats = kernels.confidence(logits.flatten(0, 1), banned, **self.statistics)
        raw = logits.float().masked_fill(banned, -torch.inf) if self.temperature > 0 else None
        return self.scores(stats, logits.shape[:2], noise, raw)

    def scores(
        self, stats: kernels.Confidence, shape: tuple[int, int], noise: Tensor | None, logits: Tensor | None = None
    ) -> Scores:
        """Scores of shape [R, Q] from `stats` [R * Q]; a temperature draws from logits [R, Q, V] fp32, -inf where banned."""
        top, prob, lse, entropy, margin = (None if x is None else x.view(shape) for x in stats)
        gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7))) if noise is not None else None
        if self.temperature > 0:
            top = (self._truncate(logits / self.temperature) + gumbel[..., :-1]).argmax(-1)
            prob = (logits.gather(-1, top[..., None])[..., 0] - lse).exp()
        conf = {
            "probability": prob,
            "margin": margin,
            "entropy": -entropy if entropy is not None else None,
        }.get(self.confidence)
        if self.confidence == "random":
            conf = noise[..., -1]
        if self.alg_temp > 0:
            conf = conf / self.alg_temp + gumbel[..., -1]
        return Scores(top, conf, entropy, margin)

    def probability(self, logits: Tensor, ids: Tensor, banned: Tensor) -> Tensor:
        """logits [R, Q, V] -> the probability of ids [R, Q], fp32 [R, Q], untempered as every confidence is."""
        lse = kernels.confidence(logits.flatten(0, 1), banned).lse.view_as(ids)
        return (logits.gather(-1, ids[..., None])[..., 0].float() - lse).exp()

    def _truncate(self, logits: Tensor) -> Tensor:
        """-inf outside the top-k and the nucleus; the most likely token always stays."""
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            values, order = logits.sort(-1, descending=True)
            before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
            outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            logits = logits.masked_fill(outside, -torch.inf)
        return logits
