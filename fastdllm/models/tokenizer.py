# SPDX-License-Identifier: Apache-2.0
"""Tokenizers from their published files, without remote code.

LLaDA and Fast-dLLM v2 ship `tokenizer.json`. Dream ships the slow format (`vocab.json`, `merges.txt`, added tokens) and a
Python class on the hub; its rules are Qwen2's, so the files are enough. Added tokens are gathered from every file that lists
them, and each keeps the id of the files: two files that disagree are an error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdllm.models.files import TOKENIZER_FILES, Fields, present, read_object, read_text
from fastdllm.models.spec import END_ROLE, MASK_ROLE

with warnings.catch_warnings():
    # In a notebook without ipywidgets, tqdm complains when transformers imports it, of a bar that nobody asked for.
    warnings.filterwarnings("ignore", message="IProgress not found")
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

# Qwen2's split (its tokenizer.json, and `tokenization_qwen2.py` in transformers): contractions, words, single digits,
# punctuation, line breaks, spaces.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("bos_token", "eos_token", "pad_token", "mask_token", "unk_token")
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
MAX_ID = 2**24
# Every visible letter of ASCII, then a character for each further byte that UTF-8 has, the first of one or a later one.
PROBE = [chr(i) for i in (*range(33, 127), *range(0x80, 0xC0), *range(0xC0, 0x800, 0x40), *range(0x1000, 0x10000, 0x1000))]
PROBE = [c for c in (*PROBE, *map(chr, range(0x10000, 0x110000, 0x40000))) if not 0xD800 <= ord(c) < 0xE000]


@dataclass(frozen=True)
class Added:
    """One added token as one file lists it."""

    text: str
    id: int
    source: str
    flags: dict[str, bool]

    def token(self) -> AddedToken:
        return AddedToken(self.text, **self.flags)


def _flags(entry: Fields) -> dict[str, bool]:
    special = entry.flag("special")
    flags = {name: entry.flag(name) for name in ("lstrip", "rstrip", "single_word")}
    return {**flags, "special": special, "normalized": entry.flag("normalized", not special)}


def _token_id(value: Any, text: str, path: Path) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_ID:
        raise ValueError(f"{path}: the token {text!r} has the id {value!r}, not a number from 0 to {MAX_ID - 1}")
    return value


class TokenizerFiles:
    """What a checkpoint folder says about its tokenizer, file by file; a file that is not there is empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self._object("tokenizer_config.json")
        self.map = self._object("special_tokens_map.json")

    def path(self, name: str) -> Path:
        return self.folder / name

    def _object(self, name: str) -> Fields:
        path = self.path(name)
        return Fields(read_object(path) if present(path) else {}, str(path))

    def named(self) -> dict[str, str]:
        """The texts of bos_token, eos_token, ... of both files; tokenizer_config.json overrides."""
        return {name: text for file in (self.map, self.config) for name in SPECIAL if (text := self._text(file, name))}

    @staticmethod
    def _text(file: Fields, name: str) -> str | None:
        value = file.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise file.wrong(name, "it must be a text or an object with the text as 'content'")
        return value

    def control(self) -> set[str]:
        """The texts that some file calls special: the named ones, and those of the lists of further ones."""
        found = set(self.named().values())
        for file in (self.map, self.config):
            for name in SPECIAL_LISTS:
                listed = file.get(name, [])
                listed = list(listed.values()) if isinstance(listed, dict) else listed
                texts = (
                    [t.get("content") if isinstance(t, dict) else t for t in listed] if isinstance(listed, list) else [None]
                )
                if not all(isinstance(t, str) for t in texts):
                    raise file.wrong(name, "it must be a list of texts")
                found.update(texts)
        return found

    def added(self, listed: list[Any]) -> Iterator[Added]:
        """Every added token that a file lists; `listed`: those of tokenizer.json. Of a token's flags the last are right."""
        control, path = self.control(), self.path("added_tokens.json")
        for text, value in self._object("added_tokens.json").items():
            special = text in control
            yield Added(text, _token_id(value, text, path), path.name, {"special": special, "normalized": not special})
        path = self.path("tokenizer.json")
        for entry in listed:
            fields = Fields(entry if isinstance(entry, dict) else {}, f"{path}: added_tokens")
            text = fields.text("content")
            yield Added(text, _token_id(fields.get("id"), text, path), path.name, _flags(fields))
        path = self.path("tokenizer_config.json")
        decoder = self.config.inner("added_tokens_decoder")
        for value in decoder:
            fields = decoder.inner(value)
            text = fields.text("content")
            yield Added(text, _token_id(value, text, path), path.name, _flags(fields))

    def tokens(self, listed: list[Any]) -> list[Added]:
        """The added tokens in the order of their ids. Raises ValueError where two files disagree."""
        by_text: dict[str, Added] = {}
        by_id: dict[int, Added] = {}
        for token in self.added(listed):
            for other in (by_text.get(token.text, token), by_id.get(token.id, token)):
                if (other.text, other.id) != (token.text, token.id):
                    raise ValueError(
                        f"{self.folder}: {other.source} has the added token {other.text!r} at {other.id}, "
                        f"{token.source} has {token.text!r} at {token.id}"
                    )
            by_text[token.text] = by_id[token.id] = token
        return [token for _, token in sorted(by_id.items())]

    def template(self) -> str | None:
        """The chat template: its own file, else tokenizer_config.json's, where a list names several."""
        path = self.path("chat_template.jinja")
        if present(path):
            return read_text(path)
        value = self.config.get("chat_template")
        if value is None and present(self.path("chat_template.json")):
            value = self._object("chat_template.json").text("chat_template")
        if isinstance(value, list):
            named = {str(t.get("name")): t["template"] for t in value if isinstance(t, dict) and "template" in t}
            value = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
            if value is None:
                raise ValueError(f"{self.config.where}: chat_template has templates named {sorted(named)}, but no 'default'")
        if value is not None and not isinstance(value, str):
            raise self.config.wrong("chat_template", "it must be a text or a list of {name, template}")
        return value


def _build(described: dict[str, Any], path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(described))
    except BaseException as error:  # the library raises bare Exception, and a PanicException that is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from error


def _from_vocab_and_merges(files: TokenizerFiles) -> dict[str, Any]:
    """The description (as in a tokenizer.json) of Qwen2's tokenizer over vocab.json and merges.txt."""
    vocab = read_object(files.path("vocab.json"))
    _owners(vocab, files.path("vocab.json"))
    lines = read_text(files.path("merges.txt")).split("\n")
    pairs = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if bad := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"{files.path('merges.txt')}: the line {' '.join(bad)[:60]!r} is not a pair of tokens")
    try:
        tokenizer = Tokenizer(models.BPE(vocab, [(a, b) for a, b in pairs]))
    except Exception as error:
        raise ValueError(f"{files.path('merges.txt')}: not the merges of vocab.json ({error})") from error
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return json.loads(tokenizer.to_str())


def _owners(vocab: dict[str, Any], path: Path) -> dict[int, str]:
    """Id -> text of a vocabulary. Raises ValueError for what is no id, and for two texts at one id."""
    owner: dict[int, str] = {}
    for text, value in vocab.items():
        if isinstance(value, str):
            value = None  # only added_tokens_decoder has ids that are texts
        number = _token_id(value, text, path)
        if (other := owner.setdefault(number, text)) != text:
            raise ValueError(f"{path}: the tokens {other!r} and {text!r} have one id, {number}")
    return owner


def _with_added(described: dict[str, Any], files: TokenizerFiles, path: Path) -> Tokenizer:
    """The tokenizer with every added token at the id of the files.

    The library numbers added tokens itself, one after the other. So each is first a word of the vocabulary, which may have
    any id; no merge leads to it, hence ordinary text never becomes one.
    """
    listed = described.get("added_tokens") or []
    if not isinstance(listed, list):
        raise ValueError(f"{path}: added_tokens is not a list")
    tokens = files.tokens(listed)
    model = described.get("model")
    # What a training left behind: it would cut or lengthen prompts, or split them otherwise each time.
    described = {**described, "truncation": None, "padding": None}
    if isinstance(model, dict) and "dropout" in model:
        model = described["model"] = {**model, "dropout": None}
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict):  # a Unigram's list: its added tokens follow one after the other
        tokenizer = _build(described, path)
    else:
        owner = _owners(vocab, path)
        for token in tokens:
            if vocab.get(token.text, token.id) != token.id or owner.get(token.id, token.text) != token.text:
                there = (
                    f"{token.text!r} at {vocab[token.text]}" if token.text in vocab else f"{owner[token.id]!r} at {token.id}"
                )
                raise ValueError(
                    f"{files.folder}: {token.source} has the added token {token.text!r} at {token.id}, "
                    f"the vocabulary of {path.name} has {there}"
                )
        words = {**vocab, **{token.text: token.id for token in tokens}}
        tokenizer = _build({**described, "model": {**model, "vocab": words}, "added_tokens": []}, path)
    for token in tokens:
        add = tokenizer.add_special_tokens if token.flags["special"] else tokenizer.add_tokens
        add([token.token()])
        if (got := tokenizer.token_to_id(token.text)) != token.id:
            raise ValueError(f"{files.folder}: the added token {token.text!r} got id {got}, {token.source} has {token.id}")
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a checkpoint folder with its chat template, or None when the folder holds no tokenizer files.

    Raises ValueError or FileNotFoundError naming the file that is missing, unreadable or in contradiction to another.
    """
    files = TokenizerFiles(folder)
    if present(files.path("tokenizer.json")):
        path = files.path("tokenizer.json")
        described = read_object(path)
    elif present(files.path("vocab.json")) or present(files.path("merges.txt")):
        path = files.path("vocab.json")
        described = _from_vocab_and_merges(files)
    elif found := [name for name in TOKENIZER_FILES if present(files.path(name))]:
        raise FileNotFoundError(f"{folder}: has {', '.join(found)}, but no tokenizer.json, nor vocab.json with merges.txt")
    else:
        return None
    tokenizer = _with_added(described, files, path)
    special = {name: text for name, text in files.named().items() if tokenizer.token_to_id(text) is not None}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = files.template()
    if lost := lost_characters(fast):
        shown = ", ".join(map(ascii, lost[:6])) + (f" and {len(lost) - 6} more" if len(lost) > 6 else "")
        warnings.warn(f"{folder}: the tokenizer has no tokens for {shown}; prompts lose them without a word", stacklevel=2)
    return fast


def lost_characters(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Characters that the tokenizer leaves out or cannot give back, of those that together have every byte of UTF-8.

    A vocabulary by bytes that lacks some, or the split that belongs to it, drops them; one with an unknown token says so.
    """
    backend = tokenizer.backend_tokenizer
    if getattr(backend.model, "unk_token", None) is not None or not isinstance(backend.model, models.BPE):
        return []
    normal = backend.normalizer.normalize_str if backend.normalizer else str
    texts = [normal(character) for character in PROBE]
    found = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    back = backend.decode_batch(found, skip_special_tokens=False)
    return [c for c, text, shown in zip(PROBE, texts, back, strict=True) if text.strip() not in shown]


def special_ids(tokenizer: PreTrainedTokenizerFast | None) -> dict[str, int]:
    """Added tokens (special ones among them) by their text, and the tokenizer's own as `MASK_ROLE` and `END_ROLE`."""
    if tokenizer is None:
        return {}
    ids = tokenizer.get_added_vocab()
    own = {MASK_ROLE: tokenizer.mask_token_id, END_ROLE: tokenizer.eos_token_id}
    return {**ids, **{role: i for role, i in own.items() if i is not None}}
