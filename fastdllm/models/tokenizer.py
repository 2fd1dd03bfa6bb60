# SPDX-License-Identifier: Apache-2.0
"""Tokenizers from their published files, without remote code.

LLaDA and Fast-dLLM v2 ship `tokenizer.json`. Dream ships the slow format (`vocab.json`, `merges.txt`, added tokens) and a
Python class on the hub; its rules are Qwen2's, so the files alone are enough.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Qwen2's split (its tokenizer.json, and `tokenization_qwen2.py` in transformers): contractions, words, single digits,
# punctuation, line breaks, spaces.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("bos_token", "eos_token", "pad_token", "mask_token", "unk_token")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _from_vocab_and_merges(folder: Path) -> Tokenizer:
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in merges if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(_json(folder / "vocab.json"), pairs))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[AddedToken]:
    """In the order of their ids, so that those outside vocab.json get the ids they were published with."""
    listed = {int(i): t for i, t in config.get("added_tokens_decoder", {}).items()}
    for text, i in _json(folder / "added_tokens.json").items():
        listed.setdefault(i, {"content": text, "special": True})
    return [
        AddedToken(
            t["content"],
            special=t.get("special", True),
            normalized=t.get("normalized", False),
            lstrip=t.get("lstrip", False),
            rstrip=t.get("rstrip", False),
            single_word=t.get("single_word", False),
        )
        for _, t in sorted(listed.items())
    ]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a checkpoint folder with its chat template, or None when the folder holds no tokenizer files.

    Added tokens keep their published ids; one that would move is an error.
    """
    config = _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokenizer = _from_vocab_and_merges(folder)
        added = _added_tokens(folder, config)
        for kind in (True, False):
            group = [t for t in added if t.special is kind]
            if group and kind:
                tokenizer.add_special_tokens(group)
            elif group:
                tokenizer.add_tokens(group)
        for text, i in _json(folder / "added_tokens.json").items():
            if tokenizer.token_to_id(text) != i:
                raise ValueError(f"{folder}: added token {text!r} got id {tokenizer.token_to_id(text)}, published as {i}")
    else:
        return None
    named = {**_json(folder / "special_tokens_map.json"), **config}
    special = {k: _text(named[k]) for k in SPECIAL if named.get(k)}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
    if isinstance(text, list):
        text = {t["name"]: t["template"] for t in text}["default"]
    fast.chat_template = text
    return fast


def special_ids(tokenizer: PreTrainedTokenizerFast | None) -> dict[str, int]:
    """Added tokens (special ones among them) by their text."""
    return dict(tokenizer.get_added_vocab()) if tokenizer is not None else {}
