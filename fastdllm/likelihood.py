# SPDX-License-Identifier: Apache-2.0
"""How likely a text is to a masked diffusion model.

Such a model has no probability from left to right that could be read off. For bidirectional models the published measure
(LLaDA, arXiv 2502.09992, and its get_log_likelihood.py) is a lower bound of the likelihood. Draw l uniformly from 1..L, then
l of the L target tokens, and take L / l times the log-probabilities of these l tokens given all others. Monte Carlo
estimates the expectation of that. Where all 2^L - 1 choices are no more than the samples asked for, they are summed instead,
which is exact; one token takes one forward.

Block-causal models (Fast-dLLM v2) see nothing after a token's block. For them the chain rule from left to right is exact:
token t is scored with everything before it written, and with itself and the rest of its block masked. That is how the model
decodes one token per step from the left. `first_token` is the published measure, which scores only the first target token.

Models that read their context causally (Nemotron) have a probability from left to right, and one forward over the whole
text gives it. There the chain rule is that of autoregressive decoding.

Every measure is a list of `Probe`s: a canvas with masks, and the tokens asked for. T is the length of a canvas, V the
vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdllm.fields import coerce, shown
from fastdllm.forward import Window
from fastdllm.models import Model, ModelSpec
from fastdllm.prompts import check_model, encode_pair
from fastdllm.sampling import guide
from fastdllm.store import KVStore, block_end
from fastdllm.threads import use_threads


class Reads(Enum):
    """What a measure asks of a model."""

    BOTH_WAYS = "bidirectional"
    BY_BLOCKS = "block-causal"
    ANY_WAY = "any"

    def fits(self, spec: ModelSpec) -> bool:
        if self is Reads.BY_BLOCKS:
            return bool(spec.block_causal)
        return self is Reads.ANY_WAY or not (spec.block_causal or spec.causal_context)


METHODS = {"monte_carlo": Reads.BOTH_WAYS, "chain": Reads.ANY_WAY, "first_token": Reads.BY_BLOCKS}
MOST_SAMPLES = 2**16  # of Monte Carlo, whose masks are drawn all at once
HEAD_ROWS = 256  # positions whose logits are held at once: [256, 152064] in fp32 is 150 MB


@dataclass(frozen=True)
class Score:
    """How likely a target of L tokens is.

    log_likelihood: in nats.
    greedy: whether greedy decoding gives the target; False when it was not asked for.
    tokens: the target's token ids [L].
    logprobs: the share of each of them [L] in the log-likelihood, which is their sum. By the chain rule that is the token's
        log-probability given those before it. Under Monte Carlo it is the weighted mean over the samples that mask it, and
        under first_token it is 0 for all but the first.
    """

    log_likelihood: float
    greedy: bool
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Probe:
    """What is read off one canvas.

    ids: [T], the canvas.
    prompt: how many of its positions are the prompt.
    at: [n], the positions that are asked about.
    tokens: [n], the tokens asked for there.
    open: where the first block that is no context begins. None: there is none, and a model that reads its context causally
        predicts each token from the one before it.
    """

    ids: Tensor
    prompt: int
    at: Tensor
    tokens: Tensor
    open: int | None = None


@dataclass(frozen=True)
class Reading:
    """Of the n tokens of a probe: log-probability [n]; most likely token [n] and its probability [n] (never a banned id)."""

    log_prob: Tensor
    top: Tensor
    conf: Tensor

    def each(self) -> list[Reading]:
        """One reading for each token."""
        columns = (column.split(1) for column in (self.log_prob, self.top, self.conf))
        return [Reading(*token) for token in zip(*columns, strict=True)]


def log_likelihoods(
    model: Model,
    pairs: Sequence[tuple[Any, Any]],
    *,
    method: str | None = None,
    mc_num: int = 128,
    seed: int = 0,
    batch_size: int = 8,
    check_greedy: bool = True,
    cfg_scale: float = 0.0,
) -> list[Score]:
    """Score each (context, target); an empty target gives 0.0 and True.

    pairs: of each, the context is a text, a conversation or token ids [P], the target a text or token ids [L] (tensors,
        arrays or lists). Two texts are tokenised as one, and the target begins with the first token that the context by
        itself does not have, as lm-eval scores. The target after a conversation is what the assistant says.
    method: "monte_carlo" (bidirectional models, their default), "chain" (any model; the default of all others), or
        "first_token" (block-causal models).
    mc_num: samples of Monte Carlo.
    seed: draws them for each pair anew, so that a pair's score depends on no other pair.
    batch_size: canvases in one forward.
    check_greedy: also say whether greedy decoding gives the target. Under Monte Carlo that commits the most confident token
        of the masked target until none is masked (as published), which takes up to L forwards.
    cfg_scale: classifier-free guidance as in `DecodeConfig`; 0 is off.

    Raises ValueError for options that make no sense and for a pair that exceeds the model's context.
    """
    check_model(model)
    method = _method(model, method)
    mc_num, batch_size = _at_least("mc_num", mc_num, 1), _at_least("batch_size", batch_size, 1)
    if mc_num > MOST_SAMPLES:
        raise ValueError(f"mc_num={mc_num} must be at most {MOST_SAMPLES}")
    seed, check_greedy = coerce("seed", seed, int), coerce("check_greedy", check_greedy, bool)
    cfg_scale = _at_least("cfg_scale", cfg_scale, 0.0)
    if abs(seed) > 2**62:
        raise ValueError(f"seed={shown(seed)} must lie between {-(2**62)} and {2**62}")
    pairs = _pairs(model, pairs)
    # Long canvases first, side by side with their like: little padding, and memory trouble shows at once.
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    of_pair = {
        "monte_carlo": partial(_masked, mc_num=mc_num, seed=seed),
        "chain": _left_to_right,
        "first_token": _first_token,
    }[method]
    probes = ((i, weight, probe) for i in order if len(pairs[i][1]) for weight, probe in of_pair(model, *pairs[i]))
    shares = [torch.zeros(len(target), dtype=torch.float64) for _, target in pairs]
    greedy = [True] * len(pairs)
    # A probe that is exact by itself (one token, or a step of the chain) also says whether greedy decoding takes it.
    for (i, weight, probe), reading in read(model, probes, batch_size, cfg_scale):
        shares[i][probe.at - len(pairs[i][0])] += weight * reading.log_prob.double()
        greedy[i] = greedy[i] and bool((reading.top == probe.tokens).all())
    if method == "monte_carlo":
        asked = [i for i in order if len(pairs[i][1]) > 1]
        found = _greedy(model, [pairs[i] for i in asked], batch_size, cfg_scale) if check_greedy else [False] * len(asked)
        for i, agrees in zip(asked, found, strict=True):
            greedy[i] = agrees
    return [
        Score(float(share.sum()), g, tuple(target.tolist()), tuple(share.tolist()))
        for share, g, (_, target) in zip(shares, greedy, pairs, strict=True)
    ]


def _method(model: Model, method: str | None) -> str:
    """The measure of that name, or the family's own; ValueError for one that this model cannot be asked."""
    fitting = [name for name, reads in METHODS.items() if reads.fits(model.spec)]
    method = fitting[0] if method is None else method
    if method not in fitting:
        allowed = ", ".join(fitting)
        raise ValueError(f"likelihood={shown(method)} does not fit the family {model.spec.family!r}; allowed are {allowed}")
    return method


Number = TypeVar("Number", int, float)


def _at_least(name: str, value: Any, low: Number) -> Number:
    """A number of the type of `low` and not below it."""
    number: Number = coerce(name, value, type(low))
    if number < low:
        raise ValueError(f"{name}={number} must be at least {low:g}")
    return number


def _pairs(model: Model, pairs: Any) -> list[tuple[Tensor, Tensor]]:
    """Token ids of each (context, target); ValueError for what is no list of them."""
    try:
        given = list(pairs)
    except TypeError as error:
        raise ValueError(f"pairs={shown(pairs)} must be a list of (context, target)") from error
    return [_pair(model, i, pair) for i, pair in enumerate(given)]


def _pair(model: Model, i: int, given: Any) -> tuple[Tensor, Tensor]:
    """A context and a target as rows of ids that the model can read."""
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ValueError(f"pairs[{i}]={shown(given)} must be two, (context, target), each a text or a row of token ids")
    context, target = encode_pair(model, *given)
    _check_lengths(model, len(context), len(target))
    for name, ids in (("context", context), ("target", target)):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < model.spec.vocab:
            raise ValueError(f"a {name} has token ids outside 0..{model.spec.vocab - 1}")
    return context, target


def _check_lengths(model: Model, context: int, target: int) -> None:
    spec = model.spec
    if context + target > spec.max_length:
        raise ValueError(
            f"context and target have {context + target} tokens, more than the model's context of {spec.max_length}"
        )
    if target and context < max(spec.shift, spec.causal_context):
        raise ValueError(f"the family {spec.family!r} predicts a token from the one before it: the context may not be empty")


def draw_masks(length: int, mc_num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Masks [N, length] bool and the weight [N] of each one's log-probabilities in the likelihood.

    All of them where that is no more than `mc_num`; else `mc_num` draws whose numbers of masked tokens are spread evenly
    over 1..length from a random start (as published: the same expectation as independent draws, less noise).
    """
    if length < 31 and 2**length - 1 <= mc_num:
        bits = torch.arange(1, 2**length)
        masks = (bits[:, None] >> torch.arange(length)) % 2 == 1
        weights = [1 / (count * math.comb(length, count)) for count in masks.sum(1).tolist()]
        return masks, torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(1, length + 1, (), generator=generator)
    counts = (start + torch.arange(mc_num) * length // mc_num - 1) % length + 1
    ranks = torch.rand(mc_num, length, generator=generator).argsort(1).argsort(1)
    return ranks < counts[:, None], length / counts.double() / mc_num


def _masked(model: Model, context: Tensor, target: Tensor, mc_num: int, seed: int) -> Iterator[tuple[float, Probe]]:
    masks, weights = draw_masks(len(target), mc_num, seed)
    canvas = torch.cat([context, target])
    for mask, weight in zip(masks, weights.tolist(), strict=True):
        at = mask.nonzero()[:, 0] + len(context)
        yield weight, Probe(canvas.index_fill(0, at, model.spec.mask_id), len(context), at, canvas[at])


def _left_to_right(model: Model, context: Tensor, target: Tensor) -> Iterator[tuple[float, Probe]]:
    canvas, block = torch.cat([context, target]), model.spec.block_causal
    if model.spec.causal_context:
        if len(target):
            yield 1.0, Probe(canvas, len(context), torch.arange(len(context), len(canvas)), target)
        return
    for at in range(len(context), len(canvas)):
        end = block_end(at, block, _origin(model, len(context))) if block else len(canvas)
        ids = torch.full((end,), model.spec.mask_id)
        ids[:at] = canvas[:at]
        yield 1.0, Probe(ids, len(context), torch.tensor([at]), canvas[at : at + 1], len(context))


def _origin(model: Model, start: int | None) -> int:
    """Where blocks are counted from, in a canvas whose first block that is no context begins at `start`."""
    return start or 0 if model.spec.grid_at_prompt else 0


def _first_token(model: Model, context: Tensor, target: Tensor) -> Iterator[tuple[float, Probe]]:
    """The rest of the target stays visible and a stop token follows it, up to the end of the first token's block."""
    spec, at = model.spec, len(context)
    ids = torch.full((block_end(at, spec.block_causal, _origin(model, at)),), spec.mask_id)
    known = torch.cat([context, target, torch.tensor(spec.stop_ids[:1])])[: len(ids)]
    ids[: len(known)] = known
    ids[at] = spec.mask_id
    yield 1.0, Probe(ids, at, torch.tensor([at]), target[:1], at)


def _greedy(model: Model, pairs: list[tuple[Tensor, Tensor]], batch_size: int, cfg_scale: float) -> list[bool]:
    """Whether committing the most confident token, one a forward, writes each target; a pair is out at its first miss."""
    canvases = [torch.cat([c, torch.full_like(t, model.spec.mask_id)]) for c, t in pairs]
    left = [set(range(len(c), len(c) + len(t))) for c, t in pairs]
    agrees, pending = [True] * len(pairs), list(range(len(pairs)))
    while pending:
        probes = []
        for i in pending:
            at = torch.tensor(sorted(left[i]))
            probes.append((i, 0.0, Probe(canvases[i], len(pairs[i][0]), at, torch.cat(pairs[i])[at])))
        for (i, _, probe), reading in read(model, probes, batch_size, cfg_scale):
            best = int(reading.conf.argmax())
            agrees[i] = bool(reading.top[best] == probe.tokens[best])
            canvases[i][probe.at[best]] = probe.tokens[best]
            left[i].remove(int(probe.at[best]))
        pending = [i for i in pending if agrees[i] and left[i]]
    return agrees


def token_probes(model: Model, ids: Tensor) -> Iterator[Probe]:
    """What to read for the log-likelihood of every token of ids [P] but the first, by the chain rule from left to right; in
    a model that reads its context causally all of them at once. One probe at a time: all together take P times P ids."""
    return (probe for _, probe in _left_to_right(model, ids[:1], ids[1:]))


Asked = tuple[int, float, Probe]


@torch.inference_mode()
def read(model: Model, probes: Iterable[Asked], batch_size: int, cfg_scale: float = 0.0) -> Iterator[tuple[Asked, Reading]]:
    """What the model says of each probe, `batch_size` canvases to a forward, in order."""
    use_threads(model)
    probes, store = iter(probes), None
    while batch := list(islice(probes, min(batch_size, sys.maxsize))):
        length = max(len(probe.ids) for _, _, probe in batch)
        if store is None or store.k.shape[3] <= length:
            store = model.network.new_store(len(batch), length + 1)  # no later batch has more
        yield from zip(batch, _forward(model, [probe for _, _, probe in batch], length, store, cfg_scale), strict=True)


def canvases(
    model: Model, rows: list[Tensor], opened: list[int | None], length: int, store: KVStore
) -> tuple[Tensor, Window]:
    """Canvases [T] of up to `length` positions as one batch: their ids [B, length], and what their positions see.

    opened: of each, where its first block that is no context begins; see `Probe.open`.
    store: of at least length + 1 slots.
    """
    spec, device = model.spec, model.device
    lengths = torch.tensor([len(row) for row in rows])
    column = torch.arange(length)
    ids = torch.full((len(rows), length), spec.pad_id)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
    scratch = store.k.shape[3] - 1  # no query sees the last slot; padding is written there
    pos = torch.where(column < lengths[:, None], column, scratch)
    kv_len = lengths[:, None].expand_as(pos)
    if spec.block_causal:
        origin = torch.tensor([[_origin(model, start)] for start in opened])
        kv_len = torch.minimum(kv_len, block_end(pos, spec.block_causal, origin))
    if spec.causal_context:
        context = torch.tensor([length if start is None else start for start in opened])
        kv_len = torch.where(pos < context[:, None], pos + 1, kv_len)
    dense = not (spec.block_causal or spec.causal_context) and bool((lengths == length).all())
    hide = None if dense else torch.zeros(len(rows), 2, dtype=torch.long, device=device)
    numbers = torch.arange(len(rows), device=device)
    return ids, Window(numbers, pos.to(device), kv_len.contiguous().to(device), length, dense, hide)


def _forward(model: Model, probes: list[Probe], length: int, store: KVStore, cfg_scale: float) -> list[Reading]:
    spec, device = model.spec, model.device
    ids, window = canvases(model, [p.ids for p in probes], [p.open for p in probes], length, store)
    hidden = [model.network(ids.to(device), window, store)]
    if cfg_scale:
        prompt = torch.tensor([p.prompt for p in probes])
        free = ids.masked_fill(torch.arange(length) < prompt[:, None], spec.mask_id)
        hidden.append(model.network(free.to(device), window, store))
    shifts = [int(spec.causal_context and p.open is None) or spec.shift for p in probes]
    source = torch.cat([row * length + p.at - shifts[row] for row, p in enumerate(probes)]).to(device)
    tokens = torch.cat([p.tokens for p in probes]).to(device)
    parts = []
    for where, wanted in zip(source.split(HEAD_ROWS), tokens.split(HEAD_ROWS), strict=True):
        logits = [model.network.logits(h.flatten(0, 1)[where]).float() for h in hidden]  # [n, V]
        parts.append(_read_logits(logits[0] if not cfg_scale else guide(*logits, cfg_scale), wanted, model.banned))
    log_prob, top, conf = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    counts = [len(p.at) for p in probes]
    return [Reading(*of) for of in zip(log_prob.split(counts), top.split(counts), conf.split(counts), strict=True)]


def _read_logits(logits: Tensor, tokens: Tensor, banned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n, V] fp32, tokens [n] -> log-probabilities over the whole vocabulary, best token that is not banned, its
    probability; all [n]."""
    total = logits.logsumexp(-1)
    best, top = logits.masked_fill(banned, -torch.inf).max(-1)
    return logits.gather(1, tokens[:, None])[:, 0] - total, top, (best - total).exp()
