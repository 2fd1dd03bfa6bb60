# SPDX-License-Identifier: Apache-2.0
"""A conversation as messages, rendered anew for every turn.

Keeping token ids from one turn to the next is how the published chat lets the remains of an answer (what stands after its
end token) into the next prompt. Here only texts are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdllm.conversations import encode_messages, fold_system, takes_system
from fastdllm.ui.options import about

if TYPE_CHECKING:
    from fastdllm.models import Model

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """What one turn sends: ids [P] int64, the user's message as sent, how many earlier messages no longer fit, and notices
    for the user."""

    ids: Tensor
    message: str
    dropped: int = 0
    notices: tuple[str, ...] = ()


@dataclass
class Conversation:
    """messages: alternating user and assistant turns that are over, as far as they are still sent; system: instructions in
    front of them; said: all turns that are over."""

    messages: list[Message] = field(default_factory=list)
    system: str = ""
    said: list[Message] = field(default_factory=list)

    def prompt(self, model: Model, text: str, gen_length: int) -> Prompt:
        """The prompt of a turn that asks `text`. Nothing changes until `add`.

        The oldest turns are left out until an answer of `gen_length` fits. ValueError for an empty message, and for one
        that does not fit even by itself.
        """
        text = clean(text)
        if not text.strip():
            raise ValueError("the message is empty")
        room = model.spec.max_length - gen_length
        ids = torch.empty(0, dtype=torch.long)
        # A model that was trained on single questions answers a second one wrongly: it never sees the first.
        first = len(self.messages) if about(model.name) else 0
        for dropped in range(first, len(self.messages) + 1, 2):
            turns = [*self.messages[dropped:], {"role": "user", "content": text}]
            ids = encode_messages(model, with_system(model, turns, self.system))
            if len(ids) <= room:
                return Prompt(ids, text, dropped, self._notices(model, dropped))
        context = model.spec.max_length
        if len(ids) < context:
            raise ValueError(
                f"an answer of {gen_length} tokens is too long: the model's context of {context} holds the message's "
                f"{len(ids)} and at most {context - len(ids)} more"
            )
        raise ValueError(
            f"the message is too long: {len(ids)} tokens, and with an answer of {gen_length} only {max(room, 0)} fit the "
            f"model's context of {context}"
        )

    def _notices(self, model: Model, dropped: int) -> tuple[str, ...]:
        notices = []
        if dropped and about(model.name):
            notices.append("this model knows single questions, so each one starts a new conversation")
        elif dropped:
            what = "message" if dropped == 1 else "messages"
            notices.append(f"context full: the oldest {dropped} {what} of this conversation are no longer sent")
        if self.system and not takes_system(model):
            notices.append("this model's chat template has no system role: the system text is put before the first message")
        if model.tokenizer.chat_template is None:
            notices.append("this checkpoint has no chat template (a base model?): it continues the plain text")
        return tuple(notices)

    def add(self, prompt: Prompt, answer: str) -> None:
        """A turn is over: remember it, forget what no longer fits."""
        turn = [{"role": "user", "content": prompt.message}, {"role": "assistant", "content": answer}]
        del self.messages[: prompt.dropped]
        self.messages += turn
        self.said += turn

    def take_back(self) -> Callable[[], None]:
        """Forget the last turn; what is returned remembers it again."""
        messages, said = self.messages[:], self.said[:]
        del self.messages[-2:], self.said[-2:]

        def put_back() -> None:
            self.messages[:], self.said[:] = messages, said

        return put_back

    def clear(self) -> None:
        """Begin anew, under the same instructions."""
        self.messages.clear()
        self.said.clear()


def clean(text: str) -> str:
    """Text that every tokenizer takes: half of a surrogate pair, which is no character, becomes a question mark."""
    return text.encode("utf-8", errors="replace").decode("utf-8").rstrip("\n")


def with_system(model: Model, turns: list[Message], system: str) -> list[Message]:
    """The turns with the system text as their first message, or inside it where the template has no such role."""
    if not system:
        return turns
    messages = [{"role": "system", "content": system}, *turns]
    return messages if takes_system(model) else fold_system(messages)
