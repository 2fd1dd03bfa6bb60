# SPDX-License-Identifier: Apache-2.0
"""The tokenizer's files: ids are those of the files, by every route; files that disagree, lack something or lose text."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdllm
from fastdllm.models import tiny_names
from fastdllm.models.hub import TINY
from fastdllm.models.tokenizer import load_tokenizer
from tests.models.checkpoint_folder import KINDS, edit, load
from tests.published_checkpoints import (
    ADDED,
    byte_pairs,
    mask_of,
    special_ids,
    write_checkpoint,
    write_json,
    write_tokenizer,
)


def entries(tokens: dict[str, tuple[int, bool]]) -> dict[str, Any]:
    return {str(i): {"content": t, "special": special} for t, (i, special) in tokens.items()}


def write_slow(folder: Path, tokens: dict[str, tuple[int, bool]], decoder: bool = True, added: bool = True) -> None:
    """vocab.json and merges.txt, with the added tokens in one, the other or both files."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = byte_pairs()
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": entries(tokens)} if decoder else {})
    if added:
        write_json(folder / "added_tokens.json", {t: i for t, (i, _) in sorted(tokens.items())})


@st.composite
def added_tokens(draw: st.DrawFn) -> dict[str, tuple[int, bool]]:
    """Some tokens at ids behind the vocabulary, special and plain in any order, with holes."""
    first = len(byte_pairs()[0])
    ids = draw(st.lists(st.integers(first, first + 40), min_size=1, max_size=9, unique=True))
    return {f"<|t{k}|>": (i, draw(st.booleans())) for k, i in enumerate(ids)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=added_tokens(), route=st.sampled_from(["decoder", "added", "both", "tokenizer.json"]))
def test_added_tokens_keep_their_ids_by_every_route(
    tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, tuple[int, bool]], route: str
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    write_slow(folder, tokens, decoder=route != "added", added=route != "decoder")
    if route == "tokenizer.json":
        described = json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
        vocab = byte_pairs()[0]  # as published: the vocabulary without the added tokens, which stand in their own list
        described["model"]["vocab"] = vocab
        for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
            (folder / name).unlink()
        random.Random(0).shuffle(described["added_tokens"])
        write_json(folder / "tokenizer.json", described)
    tokenizer = load_tokenizer(folder)
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in tokens} == {t: i for t, (i, _) in tokens.items()}
    for text, (i, special) in tokens.items():
        assert tokenizer(f"Tom{text}12", add_special_tokens=False)["input_ids"].count(i) == 1
        shown = tokenizer.decode([i], skip_special_tokens=True)
        assert shown == ("" if special and route != "added" else text)
    assert tokenizer.decode(tokenizer("Tom has 12 apples")["input_ids"]) == "Tom has 12 apples"


def test_ordinary_text_never_becomes_an_added_token(tmp_path: Path) -> None:
    """`<tool_call>` is a word of the vocabulary now; only itself leads to it."""
    write_tokenizer(tmp_path, "dream")
    tokenizer, ids = load_tokenizer(tmp_path), set(special_ids("dream").values())
    for text in ("tool_call", "<tool_cal", "< tool_call>", "<|im_end |>", "<|mask"):
        assert not ids & set(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_two_files_that_disagree_are_an_error_that_names_both(tmp_path: Path, kind: str) -> None:
    write_tokenizer(tmp_path, kind)
    mask = mask_of(kind)
    ids = special_ids(kind)
    listed = tmp_path / "added_tokens.json"
    sources = ["added_tokens.json", "tokenizer_config.json"] if kind == "dream" else ["added_tokens.json", "tokenizer.json"]
    write_json(listed, {mask: ids[mask] + 1})  # the text at another id
    with pytest.raises(ValueError, match=f"(?s){'.*'.join(sources)}|{'.*'.join(sources[::-1])}"):
        load_tokenizer(tmp_path)
    write_json(listed, {"<|other|>": ids[mask]})  # the id with another text
    with pytest.raises(ValueError, match=f"(?s){'.*'.join(sources)}|{'.*'.join(sources[::-1])}"):
        load_tokenizer(tmp_path)
    write_json(listed, {"<|other|>": 7})  # the id of a word
    with pytest.raises(ValueError, match=r"added_tokens.json has the added token '<\|other\|>' at 7, the vocabulary of"):
        load_tokenizer(tmp_path)


def test_a_token_that_one_file_lacks_comes_from_the_other(tmp_path: Path) -> None:
    """tokenizer.json without the mask, as a library that does not know it would save it."""
    write_checkpoint(tmp_path, "v2")
    edit(tmp_path / "tokenizer.json", lambda t: t["added_tokens"].pop())
    model = load(tmp_path)
    assert model.spec.mask_id == special_ids("v2")["|<MASK>|"] == model.tokenizer.convert_tokens_to_ids("|<MASK>|")


@pytest.mark.parametrize("kind, name", [("dream", "vocab.json"), ("v2", "tokenizer.json")])
@pytest.mark.parametrize("value", ["twice", 2**32 - 1, -1, 1.0, True, "7", None])
def test_a_vocabulary_has_one_text_at_an_id(tmp_path: Path, kind: str, name: str, value: Any) -> None:
    write_checkpoint(tmp_path, kind)

    def change(described: dict[str, Any]) -> None:
        vocab = described["model"]["vocab"] if kind == "v2" else described
        vocab["zz"] = vocab["a"] if value == "twice" else value

    edit(tmp_path / name, change)
    with pytest.raises(ValueError, match=f"{name}: the token.*'zz'"):
        load(tmp_path)


@pytest.mark.parametrize("hole", ["T", "Ã", "¿", "ð"])
def test_a_vocabulary_that_loses_characters_is_called_so(tmp_path: Path, hole: str) -> None:
    """A byte that a vocabulary lacks is left out of every prompt by the library, without a word."""
    write_checkpoint(tmp_path, "dream")
    edit(tmp_path / "vocab.json", lambda vocab: vocab.update({"<hole>": vocab.pop(hole)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.warns(UserWarning, match="the tokenizer has no tokens for .*prompts lose them"):
        load(tmp_path)


def test_a_vocabulary_by_bytes_without_its_split_is_called_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v2")
    edit(tmp_path / "tokenizer.json", lambda described: described.update(pre_tokenizer=None))
    with pytest.warns(UserWarning, match="the tokenizer has no tokens for .*prompts lose them"):
        load(tmp_path)


TRAINING = {
    "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
    },
}


@pytest.mark.parametrize("left", ["truncation", "padding", "dropout"])
def test_what_a_training_left_in_the_tokenizer_changes_no_prompt(tmp_path: Path, left: str) -> None:
    write_tokenizer(tmp_path, "v2")
    text = "Tom has 12 apples and the lazy dog"
    expected = load_tokenizer(tmp_path)(text)["input_ids"]
    part = {left: TRAINING[left]} if left in TRAINING else {}
    edit(tmp_path / "tokenizer.json", lambda t: (t.update(part), t["model"].update({} if part else {"dropout": 0.9})))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that characters are lost, since the text was cut
        tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.backend_tokenizer.encode(text).ids == tokenizer(text)["input_ids"] == expected


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_a_text_that_a_vocabulary_cannot_encode_is_named(tmp_path: Path, kind: str) -> None:
    """Its unknown token is missing: the library then raises a bare Exception for every other word."""
    write_checkpoint(tmp_path, "v2")
    words = {"type": kind, "vocab": {"Tom": 0, "has": 1}, "unk_token": "[UNK]"}
    words |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100} if kind == "WordPiece" else {}
    edit(tmp_path / "tokenizer.json", lambda t: t.update(model=words))
    model = load(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has no tokens for 'apples'"):
        fastdllm.generate(model, "apples", gen_length=4)


@pytest.mark.parametrize("kind", sorted(ADDED))
def test_a_whole_vocabulary_loses_nothing(tmp_path: Path, kind: str) -> None:
    write_tokenizer(tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("gone", ["merges.txt", "vocab.json"])
def test_half_a_tokenizer_is_an_error(tmp_path: Path, gone: str) -> None:
    write_checkpoint(tmp_path, "dream")
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=gone):
        load(tmp_path)


def test_a_sentencepiece_model_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", tokenizer=False)
    (tmp_path / "tokenizer.model").write_bytes(b"\0\1")
    with pytest.raises(FileNotFoundError, match=r"has tokenizer.model, but no tokenizer.json"):
        load(tmp_path)


def test_chat_templates_in_a_list(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "dream")
    message = [{"role": "user", "content": "hi"}]

    def render(template: Any) -> str:
        edit(tmp_path / "tokenizer_config.json", lambda c: c.update(chat_template=template))
        return load_tokenizer(tmp_path).apply_chat_template(message, tokenize=False)

    tools, plain = {"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ messages[0]['content'] }}!"}
    assert render([tools, plain]) == "hi!" == render([plain])
    assert render([tools]) == "t"
    unnamed = [{"name": ["default"], "template": "r"}, {"name": {}, "template": "r"}]
    for bad in ([tools, {"name": "rag", "template": "r"}], unnamed, [{"name": "default"}], [], 5, {"a": 1}):
        with pytest.raises(ValueError, match=r"tokenizer_config.json.*chat_template"):
            render(bad)


@pytest.mark.parametrize("name", tiny_names())
def test_transformers_reads_the_shipped_tokenizers(name: str) -> None:
    """`TokenizersBackend` is a class of transformers 5 only; these names are known to 4 and 5."""
    transformers = pytest.importorskip("transformers")
    kind = json.loads((TINY / name / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert kind in ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "DreamTokenizer")
    if kind == "DreamTokenizer":
        return  # published with code of its own
    assert hasattr(transformers, kind)
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(TINY / name), load_tokenizer(TINY / name)
    assert theirs.mask_token_id == ours.mask_token_id and len(theirs) == len(ours)
    for text in ("Tom has 12 apples", "naïve café <|mask|>|<MASK>|<|im_end|> x"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text, add_special_tokens=False)["input_ids"]


def test_ids_without_a_token_are_never_predicted(tmp_path: Path) -> None:
    """Holes between added tokens too, which the number of tokens does not show."""
    write_checkpoint(tmp_path, "dream")
    hole = special_ids("dream")["<|box_end|>"]
    edit(tmp_path / "added_tokens.json", lambda c: c.pop("<|box_end|>"))
    edit(tmp_path / "tokenizer_config.json", lambda c: c["added_tokens_decoder"].pop(str(hole)))
    model = load(tmp_path)
    assert model.banned[hole] and not model.banned[hole - 1] and not model.banned[hole + 1]
