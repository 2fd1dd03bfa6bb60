# SPDX-License-Identifier: Apache-2.0
"""Tokenizers from their published files: the ids of transformers' own classes, without anybody's remote code."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdllm
from fastdllm.models.tokenizer import load_tokenizer
from tests.examples import examples
from tests.published_checkpoints import ADDED, byte_pairs, special_ids, write_checkpoint, write_tokenizer

AWKWARD = [
    "Tom has 12 apples and 3456 pears; it's 7 more.",
    "  leading and trailing  ",
    "tabs\tand\nlines\r\n\r\n  after",
    "don't WON'T I'LL we'Ve 'tis",
    "naïve café été ñ",
    "e\u0301 and é are one after NFC",
    "数学と日本語 한국어 العربية",
    "🙂👩‍👩‍👧 𝔘nicode \u200b\ufeff",
    "x=1;y+=2//3!!! ...---",
    "\n\n\n",
    " ",
    "<|im_start|>user\nhi<|im_end|>\n<|mask|><|mask|> <|endoftext|>",
    "a<|mask|>b <|im_end|> c",
    "1234567890 ½ ² Ⅷ ٣",
]


@pytest.fixture(scope="module")
def dream_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dream")
    write_tokenizer(folder, "dream")
    return folder


@pytest.fixture(scope="module")
def theirs(dream_folder: Path):
    """transformers' Qwen2 tokenizer over the same vocabulary, merges and added tokens."""
    from transformers import AddedToken, Qwen2Tokenizer

    vocab, merges = byte_pairs()
    try:
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges])
    except TypeError:  # transformers 4 reads files
        tokenizer = Qwen2Tokenizer(str(dream_folder / "vocab.json"), str(dream_folder / "merges.txt"))
    for text, special in ADDED["dream"].items():  # one by one: a list is sorted by kind
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)], special_tokens=special)
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in ADDED["dream"]} == special_ids("dream")
    return tokenizer


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_the_slow_format_equals_qwen2s_tokenizer(dream_folder: Path, theirs, text: str) -> None:
    ours = load_tokenizer(dream_folder)
    ids = ours(text, add_special_tokens=False)["input_ids"]
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_the_slow_format_equals_qwen2s_tokenizer_on_any_text(dream_folder: Path, theirs) -> None:
    ours = load_tokenizer(dream_folder)
    pieces = st.sampled_from([" ", "\n", "\r\n", "'s", "12", "<|mask|>", "<|im_end|>", "the", "Tom"])
    # What an unassigned code point is depends on the Unicode version of each side's regular expressions.
    assigned = st.characters(exclude_categories=("Cn", "Cs"))

    @settings(max_examples=examples(150), deadline=None, derandomize=True)
    @given(st.lists(st.one_of(pieces, st.text(assigned, max_size=6)), max_size=8).map("".join))
    def check(text: str) -> None:
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]

    check()


@pytest.mark.parametrize("kind", ADDED)
def test_added_tokens_keep_their_published_ids(tmp_path: Path, kind: str) -> None:
    write_tokenizer(tmp_path, kind)
    tokenizer = load_tokenizer(tmp_path)
    for text, i in special_ids(kind).items():
        assert tokenizer.convert_tokens_to_ids(text) == i
        assert tokenizer(f"a{text}b", add_special_tokens=False)["input_ids"].count(i) == 1
        assert tokenizer.decode([i]) == text
        assert tokenizer.decode([i], skip_special_tokens=True) == ("" if ADDED[kind][text] else text)
    assert len(tokenizer) > max(special_ids(kind).values())


@pytest.mark.parametrize("kind", ADDED)
def test_chat_templates_are_used_for_messages(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, kind)
    model = fastdllm.load(str(tmp_path), device="cpu")
    from fastdllm.prompts import encode

    (ids,) = encode(model, [[{"role": "user", "content": "Tom has 12 apples"}]])
    text = model.tokenizer.decode(ids)
    expected = {
        "llada": "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nTom has 12 apples<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "llada_moe": "<role>HUMAN</role>Tom has 12 apples<|role_end|><role>ASSISTANT</role>",
        "llada2_moe": "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Tom has 12 apples<|role_end|>"
        "<role>ASSISTANT</role>",
    }.get(
        kind,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nTom has 12 apples<|im_end|>\n"
        "<|im_start|>assistant\n",
    )
    assert text == expected
    (again,) = encode(model, text)
    assert again.tolist() == ids.tolist()


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "dream")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    message = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(tmp_path).apply_chat_template(message, tokenize=False) == "hi!"


def test_a_folder_without_tokenizer_gives_a_model_without_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada", tokenizer=False)
    model = fastdllm.load(str(tmp_path), device="cpu")
    assert model.tokenizer is None
    assert fastdllm.generate(model, [fastdllm.generation.torch.tensor([1, 2])], gen_length=4, block_length=4).texts is None
    with pytest.raises(ValueError, match="has no tokenizer; pass token ids instead of text"):
        fastdllm.generate(model, "hello")
