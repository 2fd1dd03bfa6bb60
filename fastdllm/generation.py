# SPDX-License-Identifier: Apache-2.0
"""From prompts to texts, around the one loop of `engine/loop.py`.

generate      every prompt, whole answers
stream_text   one prompt, its answer in pieces of text that will not change any more
stream        every forward, with what it left in the blocks it worked on
trace.watch   one prompt, the history of its answer after every forward
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastdllm import fields
from fastdllm.build import assemble, runner
from fastdllm.config import DecodeConfig, rename
from fastdllm.decoding import Decoding
from fastdllm.engine import Request, Result, Step, decode
from fastdllm.memory import positions_that_fit
from fastdllm.models import Model
from fastdllm.prompts import Prompts, encode
from fastdllm.stats import Stats, peak_memory
from fastdllm.text import AnswerText, cut, is_cut, text_of

ROWS = 64  # prompts decoded together unless batch_size says otherwise, as far as memory allows
MOST_COPIES = 2**16  # answers to one prompt: each has a place in memory from the beginning
# What transformers, vLLM and lm-eval call the arguments of `generate`.
ALIASES = {"stop_strings": "stop", "until": "stop", "n": "num_return_sequences", "use_tqdm": "progress"}
Constraints = Sequence[dict[int, int]] | dict[int, int] | None


@dataclass
class Output:
    """What `generate` returns, on the CPU: one entry per answer, the answers to one prompt next to each other.

    sequences: 1-D LongTensors, prompt included, cut after the first stop token, or the token that completes a stop string.
    texts: the answers without special tokens, cut before the first stop string; None without a tokenizer.
    finish_reasons: "stop" after a stop token or a stop string, "length" for an answer that gen_length cut off.
    stats: what the run cost.
    trace: the steps, only with trace=True.
    logprobs: fp32, one per token of each answer, its stop token included: the natural logarithm of the untempered
        probability in the forward that committed the token. NaN for fixed tokens.
    committed_at: for each of these tokens the forward of its answer, from 1, that committed it; 0 for fixed tokens.
    """

    sequences: list[Tensor] = field(default_factory=list)
    texts: list[str] | None = None
    stats: Stats = field(default_factory=Stats)
    trace: list[Step] | None = None
    logprobs: list[Tensor] = field(default_factory=list)
    committed_at: list[Tensor] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)


@dataclass
class Call:
    """A call of `generate` or `stream`, understood: requests, what the run chooses, the texts that end an answer."""

    model: Model
    config: DecodeConfig
    run: Decoding
    requests: list[Request]
    stops: tuple[str, ...]

    def steps(self, trace: bool) -> Generator[Step, None, None]:
        """Decode. Without a batch_size as many requests share the canvas as memory has room for, `ROWS` at most."""
        rows, positions = self.config.batch_size, None
        if rows is None:
            rows = ROWS
            positions = positions_that_fit(self.model, min(rows, len(self.requests)))
        executor = runner(self.model, self.config)
        return decode(self.model, self.requests, self.run, executor, rows=rows, positions=positions, trace=trace)


def call_of(
    model: Model,
    ids: list[Tensor],
    config: DecodeConfig,
    constraints: Constraints,
    stop: str | Sequence[str] | None,
    copies: int,
    run: Decoding | None = None,
    numbers: Mapping[str, float] | None = None,
) -> Call:
    """A call for prompts that are encoded; `generate` says what the other arguments are. Raises its errors.

    run: one that goes on already; numbers: those of its numbers that these requests replace.
    """
    stops = _stops(model, stop)
    fixed = tokens_to_fix(constraints, len(ids))
    _check_room(model, ids, config.gen_length)
    run = run or assemble(model, config, min(len(ids), config.batch_size or ROWS))
    own = dict(numbers or {})
    copies = _checked_copies(copies, run.sampler.random({**run.numbers, **own}))
    ends = _ends(model, stops) if stops else None
    # A stop token may be written before a fixed one, so a row with fixed tokens decodes to its end.
    pairs = [pair for pair in zip(ids, fixed, strict=True) for _ in range(copies)]
    requests = [
        Request(prompt, config.gen_length, config.seed + i, tokens, () if tokens else None, own, ends)
        for i, (prompt, tokens) in enumerate(pairs)
    ]
    return Call(model, config, run, requests, stops)


def _check_room(model: Model, ids: list[Tensor], length: int) -> None:
    """ValueError for a prompt that leaves no room for an answer of `length` tokens."""
    room = model.spec.max_length - length
    for i, prompt in enumerate(ids):
        if len(prompt) > room:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with gen_length={length} at most {max(room, 0)} fit the "
                f"model's context of {model.spec.max_length}"
            )


def _checked_copies(copies: Any, drawn: bool) -> int:
    """How many answers each prompt gets. ValueError for none, and for several where nothing is drawn."""
    copies = fields.coerce("num_return_sequences", copies, int)
    if not 1 <= copies <= MOST_COPIES:
        raise ValueError(f"num_return_sequences={copies} must lie in [1, {MOST_COPIES}]")
    if copies > 1 and not drawn:
        raise ValueError(
            f"num_return_sequences={copies} would give the same answer {copies} times; it needs a temperature, an alg_temp "
            "or confidence='random'"
        )
    return copies


def merged(config: Any, options: Mapping[str, Any]) -> DecodeConfig:
    """The config of a call; options override what was passed as one."""
    if not isinstance(config, DecodeConfig | None):
        raise ValueError(f"config={fields.shown(config)} must be a DecodeConfig")
    if config is None:
        return DecodeConfig(**options)
    return config.replace(**options) if options else config


def tokens_to_fix(constraints: Any, prompts: int) -> list[dict[int, int]]:
    """The tokens to fix of each prompt, as integers; the engine compares them with the answer and the vocabulary."""
    if constraints is None or isinstance(constraints, Mapping):
        entries: Sequence[Any] = [constraints] * prompts
    elif isinstance(constraints, list | tuple):
        entries = constraints
    else:
        raise ValueError(f"constraints={fields.shown(constraints)} must be a dict, position: token id, or a list of these")
    if len(entries) != prompts:
        raise ValueError(f"constraints has {len(entries)} entries for {prompts} prompts")
    return [_tokens_at(entry) for entry in entries]


def _tokens_at(entry: Any) -> dict[int, int]:
    if not isinstance(entry, Mapping | None):
        raise ValueError(f"constraints has the entry {fields.shown(entry)}; it must be a dict, position: token id")
    for number in chain.from_iterable((entry or {}).items()):
        if not fields.is_integer(number):
            raise ValueError(f"constraints={fields.shown(entry)}: {fields.shown(number)} must be of type int")
    return {int(at): int(token) for at, token in (entry or {}).items()}


def _stops(model: Model, stop: Any) -> tuple[str, ...]:
    given = [stop] if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(given, list | tuple | set | frozenset) or not all(isinstance(text, str) for text in given):
        raise ValueError(
            f"stop={fields.shown(stop)} must be a text or a list of texts; tokens that end an answer are stop_ids"
        )
    stops = [text for text in given if text]
    if stops and getattr(model, "tokenizer", None) is None:
        raise ValueError(f"stop={stop!r} needs a tokenizer, and model {getattr(model, 'name', model)!r} has none")
    return tuple(stops)


def _ends(model: Model, stops: tuple[str, ...]) -> Callable[[Tensor], bool]:
    tokenizer: Any = model.tokenizer
    return lambda ids: is_cut(tokenizer.decode(ids, skip_special_tokens=True), stops)


def stream(
    model: Model,
    prompts: Prompts | None = None,
    config: DecodeConfig | None = None,
    *,
    constraints: Constraints = None,
    stop: str | Sequence[str] | None = None,
    num_return_sequences: int = 1,
    attention_mask: Any = None,
    **options: Any,
) -> Generator[Step, None, None]:
    """The decoding loop a step at a time, with each step's block content (see `engine.Step`).

    Takes the arguments of `generate` and raises its errors, before anything is iterated. Closing the iterator stops the
    computation.
    """
    other = renamed(options, stop=stop, num_return_sequences=num_return_sequences)
    stop, copies = other.pop("stop", None), other.pop("num_return_sequences", 1)
    prompts = prompts_of(prompts, other)
    config = merged(config, other)
    return call_of(model, encode(model, prompts, attention_mask), config, constraints, stop, copies).steps(trace=True)


def generate(
    model: Model,
    prompts: Prompts | None = None,
    config: DecodeConfig | None = None,
    *,
    constraints: Constraints = None,
    stop: str | Sequence[str] | None = None,
    num_return_sequences: int = 1,
    attention_mask: Any = None,
    progress: bool = False,
    trace: bool = False,
    **options: Any,
) -> Output:
    """Answer every prompt.

    model: what `load` returned.
    prompts: a text, texts, a conversation, conversations, 1-D id tensors, a [B, P] tensor, or what a tokenizer returns;
        lengths may differ.
    config, options: see `DecodeConfig`; options override the config.
    constraints: tokens to fix, {position in the answer: token id}, one dict for all prompts or one per prompt.
    stop: texts that end an answer and are not part of its text. Decoding ends with the block in which one appears.
    num_return_sequences: answers to each prompt, which differ by their draws.
    attention_mask: of prompts given as ids [B, P], 0 on padding.
    progress: show a bar that counts answers (needs tqdm).
    trace: keep every step.

    Other names of these are understood: n, stop_strings, until, use_tqdm, and input_ids for prompts, so that `**inputs` may
    be what a tokenizer returned. Raises ValueError for bad input, naming option, value and limit.
    """
    other = renamed(options, stop=stop, num_return_sequences=num_return_sequences, progress=progress)
    stop, copies, progress = other.pop("stop", None), other.pop("num_return_sequences", 1), other.pop("progress", False)
    prompts = prompts_of(prompts, other)
    progress, trace = fields.coerce("progress", progress, bool), fields.coerce("trace", trace, bool)
    config = merged(config, other)
    call = call_of(model, encode(model, prompts, attention_mask), config, constraints, stop, copies)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    results: dict[int, Result] = {}
    out = Output(trace=[] if trace else None)
    with _bar(len(call.requests), progress) as advance, closing(call.steps(trace)) as steps:
        for step in steps:
            out.stats.take(step)
            results.update(step.done)
            advance(len(step.done))
            if out.trace is not None:
                out.trace.append(step)
    texts = [add_answer(out, call, request, results[i]) for i, request in enumerate(call.requests)]
    out.texts = None if model.tokenizer is None else texts
    out.stats.peak_memory = peak_memory(model.device)
    return out


def renamed(options: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Options and those arguments that were given, under this project's names."""
    unset = {"stop": None, "num_return_sequences": 1, "progress": False}
    said = {k: v for k, v in given.items() if not (isinstance(v, type(unset[k])) and v == unset[k])}
    return rename({**said, **options}, ALIASES)


def prompts_of(prompts: Prompts | None, options: dict[str, Any]) -> Prompts:
    """The prompts, or what was passed for them as transformers' input_ids, which is taken out of the options.

    So are token_type_ids, which some tokenizers return for any model: these models have no such types.
    """
    given = options.pop("input_ids", None)
    if given is not None:
        options.pop("token_type_ids", None)
    if prompts is None and given is None:
        raise ValueError("prompts is missing: what shall the model answer?")
    if prompts is not None and given is not None:
        raise ValueError("prompts and input_ids are two names of one argument; give one of them")
    return given if prompts is None else prompts


def add_answer(out: Output, call: Call, request: Request, result: Result) -> str:
    """Take in a finished answer; returns its text, "" without a tokenizer."""
    prompt, tokenizer = len(request.prompt), call.model.tokenizer
    if result.broken:
        number = len(out.sequences)
        warnings.warn(f"answer {number} means nothing: the model's output was not a number (NaN)", stacklevel=3)
    ids = result.ids.cpu()
    answer, run = ids[prompt:], call.run
    length = answer_length(answer, run.stop_ids, call.model.spec.mask_id, request.fixed)
    out.stats.finish(result, length)
    text = "" if tokenizer is None else tokenizer.decode(answer[:length], skip_special_tokens=True)
    shown = cut(text, call.stops)
    kept = length + int(length < len(answer) and int(answer[length]) in run.stop_ids)
    stopped = kept > length
    if len(shown) < len(text):
        kept, stopped = _tokens_of(call, answer[:length]), True
    out.sequences.append(ids[: prompt + kept])
    out.logprobs.append(result.logprobs[:kept].cpu())
    out.committed_at.append(result.committed_at[:kept].cpu())
    out.finish_reasons.append("stop" if stopped else "length")
    return shown


def _tokens_of(call: Call, answer: Tensor) -> int:
    """How many tokens of an answer it takes until a stop string is complete."""
    tokenizer: Any = call.model.tokenizer
    low, high = 1, len(answer)
    while low < high:
        middle = (low + high) // 2
        text = tokenizer.decode(answer[:middle], skip_special_tokens=True)
        low, high = (low, middle) if len(cut(text, call.stops)) < len(text) else (middle + 1, high)
    return low


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], Any]]:
    """Gives the function that advances a bar of `total` answers; one that does nothing where no bar is shown."""
    if not shown:
        yield lambda count: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    with tqdm(total=total, unit="answer") as bar:
        yield bar.update


def stream_text(
    model: Model,
    prompt: Prompts | None = None,
    config: DecodeConfig | None = None,
    *,
    stop: str | Sequence[str] | None = None,
    constraints: dict[int, int] | None = None,
    attention_mask: Any = None,
    **options: Any,
) -> Iterator[str]:
    """The answer to one prompt in pieces of text that will not change any more; joined, they are the answer.

    A piece ends with a whole character and never holds a part of a stop string. Takes the arguments of `generate`, for one
    prompt. Closing the iterator stops the computation. Raises ValueError for several prompts and for a model without a
    tokenizer.
    """
    other = renamed(options, stop=stop)
    stop, prompt = other.pop("stop", None), prompts_of(prompt, other)
    config = merged(config, other)
    call = call_of(model, encode(model, prompt, attention_mask), config, constraints, stop, 1)
    return _pieces(call, answer_text(call))


def answer_text(call: Call) -> AnswerText:
    """The text of a call's one answer; ValueError for several prompts and for a model without a tokenizer."""
    if len(call.requests) != 1:
        raise ValueError(f"stream_text follows one prompt, not {len(call.requests)}")
    if call.model.tokenizer is None:
        raise ValueError(f"model {call.model.name!r} has no tokenizer, so its answer has no text")
    request, run = call.requests[0], call.run
    return text_of(call.model, request.length, run.stop_ids, call.stops, request.fixed, run.decoder.revocable())


def _pieces(call: Call, answer: AnswerText) -> Iterator[str]:
    prompt = len(call.requests[0].prompt)
    with closing(call.steps(trace=True)) as steps:
        for step in steps:
            start = max(step.starts[0], prompt)
            assert step.ids is not None  # of a traced step
            piece = answer.step(start - prompt, step.ids[0, : step.stops[0] - start].tolist())
            if 0 in step.done:
                piece += answer.finish(step.done[0].ids[prompt:].tolist())
            if piece:
                yield piece
            if answer.ended:
                return


def answer_length(answer: Tensor, stop_ids: Sequence[int], mask_id: int, fixed: Iterable[int] = ()) -> int:
    """Tokens of an answer [N] on the CPU: those before its end, N when there is none.

    It ends with the first mask, where blocks begin that nobody needed, and with the first stop token. fixed: positions of
    constraints; a stop token before one of them does not end the answer, a mask does.
    """
    ends = torch.isin(answer, torch.tensor(stop_ids, dtype=torch.long))
    ends[: max(fixed, default=-1) + 1] = False
    at = (ends | (answer == mask_id)).nonzero()  # sync: already on the CPU
    return int(at[0]) if len(at) else len(answer)
