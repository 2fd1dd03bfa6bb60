# SPDX-License-Identifier: Apache-2.0
"""Single tokens as clients see them: their text and their bytes."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdllm.models import Model


@lru_cache(1)
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet, which byte-level tokenizers spell tokens in: printable bytes stand for themselves, the others, in
    order, for the characters from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {**{chr(byte): byte for byte in own}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


class Spelling:
    """Text and bytes of a model's tokens, special tokens by name."""

    def __init__(self, model: Model) -> None:
        tokenizer: Any = model.tokenizer
        self._tokenizer = tokenizer
        self._special = set(tokenizer.get_added_vocab().values())
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """The token's text; part of a character is U+FFFD."""
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]

    def bytes(self, token: int) -> list[int]:
        """The token's UTF-8 bytes, also where it is part of a character."""
        spelt = self._tokenizer.convert_ids_to_tokens(token)
        alphabet = _byte_of()
        if token not in self._special and spelt and all(letter in alphabet for letter in spelt):
            return [alphabet[letter] for letter in spelt]
        return list(self.text(token).encode("utf-8", errors="replace"))
