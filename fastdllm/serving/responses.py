# SPDX-License-Identifier: Apache-2.0
"""What is sent to clients: OpenAI's objects, with forwards and denoising events added. docs/serving.md shows them."""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import fastdllm
from fastdllm.serving.listing import TokenList, chat_logprobs, text_logprobs

if TYPE_CHECKING:
    from torch import Tensor

    from fastdllm.engine import Request
    from fastdllm.likelihood import Reading
    from fastdllm.serving.jobs import Finished, Job, Progress
    from fastdllm.serving.protocol import Body
    from fastdllm.serving.tokens import Spelling
    from fastdllm.text import AnswerText


@dataclass(frozen=True)
class Echo:
    """A prompt that is repeated before its completion: its text and, if asked for, readings of its tokens but the first."""

    text: str
    readings: list[Reading] | None


@dataclass
class Choice:
    """One answer on its way. number: its place in the response; prompt: ids [P]; text: what is final of it."""

    number: int
    prompt: Tensor
    request: Request
    text: AnswerText
    tokens: TokenList
    result: Finished | None = None
    forwards: int = 0  # forwards whose denoising event was given out
    echo: Echo | None = None
    job: Job | None = None  # once it is taken in

    @property
    def reason(self) -> str:
        return "stop" if self.text.ended else "length"


@dataclass(frozen=True)
class Piece:
    """Something new of one choice: text, and the event of the forward that gave it. over: nothing follows."""

    choice: Choice
    text: str
    progress: Progress | None = None
    over: bool = False


@dataclass
class Asked:
    """A checked request: its choices, and how to tell about them. id, created: of the response."""

    body: Body
    choices: list[Choice]
    chat: bool
    deadline: float
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    scored: int = 0  # forwards that scored prompts


@dataclass(frozen=True)
class Responses:
    """Renders requests and their choices.

    name: what clients call the model.
    spelling: of its tokens.
    mask_id: its mask token.
    """

    name: str
    spelling: Spelling
    mask_id: int

    def whole(self, asked: Asked) -> dict[str, Any]:
        """The response of a request that is finished."""
        render = self._chat_choice if asked.chat else self._text_choice
        return {
            **self.head(asked, "chat.completion" if asked.chat else "text_completion"),
            "choices": [render(asked, choice) for choice in asked.choices],
            "usage": self.usage(asked),
        }

    def chunk_head(self, asked: Asked) -> dict[str, Any]:
        """What every chunk of a streamed response begins with."""
        return self.head(asked, "chat.completion.chunk" if asked.chat else "text_completion")

    def first(self, asked: Asked, choice: Choice) -> dict[str, Any] | None:
        """What a choice's first chunk says of it, before any text; None where there is nothing to say."""
        if asked.chat:
            role = {"role": "assistant", "content": ""}
            return {"index": choice.number, "delta": role, "finish_reason": None}
        return self._text_delta(asked, choice, choice.echo.text, None) if choice.echo else None

    def delta(self, asked: Asked, choice: Choice, text: str, reason: str | None) -> dict[str, Any]:
        """Further text of a choice; reason: why it ended, None where it goes on."""
        return (self._chat_delta if asked.chat else self._text_delta)(asked, choice, text, reason)

    def head(self, asked: Asked, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if asked.chat else "cmpl"
        return {
            "id": f"{prefix}-{asked.id}",
            "object": kind,
            "created": asked.created,
            "model": self.name,
            "system_fingerprint": f"fastdllm-{fastdllm.__version__}",
        }

    def usage(self, asked: Asked) -> dict[str, Any]:
        choices = asked.choices
        prompts = {id(choice.prompt): len(choice.prompt) for choice in choices}
        prompt, tokens = sum(prompts.values()), sum(choice.text.tokens for choice in choices)
        forwards = sum(choice.result.forwards for choice in choices if choice.result)
        forwards += asked.scored
        # Of several answers to one prompt the first computes it for the others; it is the prompt's own figure that counts.
        cached: dict[int, int] = {}
        for choice in choices:
            if choice.result:
                before = cached.get(id(choice.prompt), choice.result.cached)
                cached[id(choice.prompt)] = min(before, choice.result.cached)
        return {
            "prompt_tokens": prompt,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "forwards": forwards,
            "tokens_per_forward": round(tokens / max(1, forwards), 3),
        }

    def _chat_choice(self, asked: Asked, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.number,
            "message": {"role": "assistant", "content": choice.text.text, "refusal": None},
            "logprobs": self._logprobs(asked, choice, True),
            "finish_reason": choice.reason,
        }

    def _chat_delta(self, asked: Asked, choice: Choice, text: str, reason: str | None) -> dict[str, Any]:
        return {
            "index": choice.number,
            "delta": {"content": text} if text else {},
            "logprobs": self._logprobs(asked, choice, reason is not None),
            "finish_reason": reason,
        }

    def _text_choice(self, asked: Asked, choice: Choice) -> dict[str, Any]:
        text = (choice.echo.text if choice.echo else "") + choice.text.text
        return self._text_delta(asked, choice, text, choice.reason)

    def _text_delta(self, asked: Asked, choice: Choice, text: str, reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs(asked, choice, reason is not None)
        return {"index": choice.number, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, asked: Asked, choice: Choice, over: bool) -> dict[str, Any] | None:
        """Of the tokens that came since the last call; None where nobody asked."""
        most = asked.body.top_alternatives
        if most is None:
            return None
        if choice.result is not None:
            choice.tokens.complete(choice.result.logprobs)
        fresh = choice.tokens.take(choice.text, over)
        if asked.chat:
            return chat_logprobs(self.spelling, fresh, most)
        if over:
            # Completions list the stop token too, as OpenAI does: clients that score a prompt count on one token after it.
            fresh += choice.tokens.end(choice.text)
        echo, prompt = choice.echo, None
        if echo is not None and echo.readings is not None:
            prompt = (choice.prompt.tolist(), echo.readings)
            choice.echo = Echo(echo.text, None)  # once
        return text_logprobs(self.spelling, fresh, most, prompt, len(echo.text) if echo else 0)

    def denoising(self, piece: Piece) -> dict[str, Any]:
        """One forward as the client sees it; positions count from the start of the answer."""
        progress, mask = piece.progress, self.mask_id
        assert progress is not None
        tokens = [None if token == mask else self.spelling.text(token) for token in progress.ids]
        confidence = [None if math.isnan(value) else round(value, 6) for value in progress.confidence]
        committed = [progress.start + i for i, new in enumerate(progress.committed) if new]
        return {
            "index": piece.choice.number,
            "forward": progress.forward,
            "start": progress.start,
            "stop": progress.start + len(progress.ids),
            "tokens": tokens,
            "ids": [None if token == mask else token for token in progress.ids],
            "confidence": confidence,
            "committed": committed,
            "seconds": round(progress.seconds, 6),
            "rows": progress.rows,
        }
