# SPDX-License-Identifier: Apache-2.0
"""Typed answers with probabilities, read off a template whose answers are masks; nothing is generated.

The prompt is followed by one line per question, `name (option/option): `, and a slot of masks. A masked model scores every
slot in one forward. An option's score is the sum of the log-probabilities of its tokens over its span, each given the rest
of the template (the tokens of a span do not see each other), normalised over the question's options.

Options of another length need another canvas, which shares the forward where it fits. So there are as many canvases as the
question with the most distinct lengths has of them.

A bidirectional model reads all questions off one canvas. The others were trained on finished text before the open block, so
there each question has a canvas of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdllm.conversations import check_text, encode_literally
from fastdllm.fields import shown
from fastdllm.likelihood import Probe, read
from fastdllm.prompts import Prompts, check_model, encode

if TYPE_CHECKING:
    from fastdllm.models import Model

TYPES = ("choice", "yes_no", "score")
DEFAULTS: dict[str, list[Any]] = {"yes_no": ["yes", "no"], "score": list(range(10))}
CANVASES = 16  # in one forward
LARGEST = 1e15  # of a number among the options: beyond it a mean of them is not exact


@dataclass(frozen=True)
class Question:
    """What is asked.

    name: of the answer.
    type: "choice" (one of the options), "yes_no" (one of two options), or "score" (a number).
    options: what may be answered; yes and no for "yes_no" and 0 to 9 for "score" unless others are given.
    text: what the template asks, by default the name.
    """

    name: str
    type: str
    options: tuple[str | int | float, ...]
    text: str


@dataclass(frozen=True)
class Decision:
    """The answer to one question.

    name, type: of the question.
    answer: the likeliest option.
    probabilities: of each option; they add up to 1.
    mean: the expected score; None for other types.
    """

    name: str
    type: str
    answer: str | int | float
    probabilities: dict[str | int | float, float]
    mean: float | None = None


class Decisions(dict[str, Decision]):
    """`Decision`s by name.

    prompt_tokens: length of the prompt.
    canvases: templates that were scored.
    forwards: model calls that scored them.
    """

    prompt_tokens: int = 0
    canvases: int = 0
    forwards: int = 0


def decide(model: Model, prompt: Prompts, questions: Sequence[Mapping[str, Any]]) -> Decisions:
    """Answer typed questions about one prompt.

    model: with a tokenizer.
    prompt: a text, a conversation or token ids, as `fastdllm.generate` takes one.
    questions: dicts with "name", "type" ("choice", "yes_no" or "score") and, for a choice, "options"; "text" asks in other
        words than the name.

    Raises ValueError for a question that makes no sense, for several prompts, and for a template beyond the model's context.
    """
    check_model(model)
    if not isinstance(questions, list | tuple):
        raise ValueError(f"questions={shown(questions)} must be a list of dicts")
    asked = [parse(i, question) for i, question in enumerate(questions)]
    if not asked:
        raise ValueError("questions is empty")
    names = [question.name for question in asked]
    if len(set(names)) < len(names):
        raise ValueError(f"questions: the name {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    prompts = encode(model, prompt)
    if len(prompts) != 1:
        raise ValueError(f"decide asks about one prompt, not {len(prompts)}")
    if model.tokenizer is None:
        raise ValueError(f"model {model.name!r} has no tokenizer; questions are asked in text")
    ids = prompts[0].cpu()
    slots = [_slot(model, question) for question in asked]
    alone = model.spec.block_causal or model.spec.causal_context  # a question would depend on the masks of those before it
    groups = [[i] for i in range(len(slots))] if alone else [list(range(len(slots)))]
    canvases = [canvas for group in groups for canvas in _canvases(model, ids, [(i, slots[i]) for i in group])]
    scores = _score(model, canvases, slots)
    out = Decisions({q.name: _decision(q, scores[i]) for i, q in enumerate(asked)})
    out.prompt_tokens, out.canvases, out.forwards = len(ids), len(canvases), -(-len(canvases) // CANVASES)
    return out


def parse(i: int, given: Mapping[str, Any]) -> Question:
    """A question as passed by the user; ValueError naming what is wrong with the i-th one."""
    at = f"questions[{i}]"
    if not isinstance(given, Mapping):
        raise ValueError(f"{at}={shown(given)} must be a dict with name, type, options, text")
    unknown = [field for field in given if field not in ("name", "type", "options", "text")]
    if unknown:
        raise ValueError(f"{at} has the unknown field {shown(unknown[0])}; allowed are name, type, options, text")
    name, kind = given.get("name"), given.get("type")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{at}.name={shown(name)} must be a text")
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"{at}.type={shown(kind)} is unknown; allowed are {', '.join(TYPES)}")
    check_text(name, f"{at}.name")
    options = given.get("options")
    if not isinstance(options, list | tuple | range | None):
        raise ValueError(f"{at}.options={shown(options)} must be a list")
    options = options or DEFAULTS.get(kind, [])
    if len(options) < 2 or (kind == "yes_no" and len(options) != 2):
        raise ValueError(
            f"{at}.options has {len(options)} entries; {'exactly' if kind == 'yes_no' else 'at least'} 2 needed"
        )
    for option in options:
        number = isinstance(option, int | float) and not isinstance(option, bool)
        if number and not abs(option) <= LARGEST:  # of NaN and infinity there is no mean
            raise ValueError(f"{at}.options: {shown(option)} must be finite and at most {LARGEST:g}")
        if not (number if kind == "score" else number or isinstance(option, str)) or not str(option).strip():
            raise ValueError(f"{at}.options: {shown(option)} is not a {'number' if kind == 'score' else 'text or number'}")
        check_text(str(option), f"{at}.options")
    if len({str(option) for option in options}) < len(options):
        raise ValueError(f"{at}.options has an entry twice")
    text = name if given.get("text") is None else given["text"]
    if not isinstance(text, str):
        raise ValueError(f"{at}.text={shown(text)} must be a text")
    check_text(text, f"{at}.text")
    return Question(name, kind, tuple(options), text)


@dataclass(frozen=True)
class Slot:
    """A question as tokens.

    lead: what stands before its masks, with the tokens that all options begin with.
    options: the remaining token ids of each option.
    """

    lead: list[int]
    options: list[list[int]]

    @property
    def lengths(self) -> list[int]:
        """Distinct lengths of the options, shortest first."""
        return sorted({len(option) for option in self.options})


def _slot(model: Model, question: Question) -> Slot:
    choices = "/".join(str(option) for option in question.options)
    lead = encode_literally(model, f"{question.text} ({choices}):")
    options = [encode_literally(model, f" {option}") for option in question.options]
    if len({tuple(option) for option in options}) < len(options):
        raise ValueError(f"question {question.name!r}: two options are the same tokens")
    shared = len(list(takewhile(lambda tokens: len(set(tokens)) == 1, zip(*options, strict=False))))
    # An option that is the beginning of another keeps one token, so that every option has something to score.
    shared = min(shared, min(map(len, options)) - 1)
    return Slot(lead + options[0][:shared], [option[shared:] for option in options])


Entry = tuple[int, int]  # question, option
Canvas = tuple[list[Entry], Probe]  # a template, and whose token each of the probe's entries is


def _canvases(model: Model, prompt: Tensor, slots: list[tuple[int, Slot]]) -> Iterator[Canvas]:
    """The templates that together hold every length of every question; in the k-th, each question has its k-th length."""
    newline = encode_literally(model, "\n")
    for k in range(max(len(slot.lengths) for _, slot in slots)):
        ids: list[int] = prompt.tolist()
        owners: list[Entry] = []
        at: list[int] = []
        tokens: list[int] = []
        for n, (i, slot) in enumerate(slots):
            length = slot.lengths[min(k, len(slot.lengths) - 1)]
            ids += [*(newline if n else []), *slot.lead]
            for j, option in enumerate(slot.options):
                if k < len(slot.lengths) and len(option) == length:
                    owners += [(i, j)] * length
                    at += range(len(ids), len(ids) + length)
                    tokens += option
            ids += [model.spec.mask_id] * length
        if block := model.spec.block_causal:
            origin = min(at) if model.spec.grid_at_prompt else 0
            ids += [model.spec.mask_id] * ((origin - len(ids)) % block)
        if len(ids) > model.spec.max_length:
            raise ValueError(
                f"prompt and questions take {len(ids)} positions, more than the model's context of {model.spec.max_length}"
            )
        yield owners, Probe(torch.tensor(ids), len(prompt), torch.tensor(at), torch.tensor(tokens), min(at))


def _score(model: Model, canvases: list[Canvas], slots: list[Slot]) -> list[list[float]]:
    """The log-probability of each option of each question, not normalised."""
    scores = [[0.0] * len(slot.options) for slot in slots]
    asked = ((k, 0.0, probe) for k, (_, probe) in enumerate(canvases))
    for (k, _, _), reading in read(model, asked, CANVASES):
        for (i, j), value in zip(canvases[k][0], reading.log_prob.tolist(), strict=True):
            scores[i][j] += value
    return scores


def _decision(question: Question, scores: list[float]) -> Decision:
    """Scores of the options, normalised."""
    shares = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    probabilities = dict(zip(question.options, shares, strict=True))
    mean = sum(value * p for value, p in probabilities.items()) if question.type == "score" else None
    answer = max(probabilities, key=probabilities.__getitem__)
    return Decision(question.name, question.type, answer, probabilities, mean)
