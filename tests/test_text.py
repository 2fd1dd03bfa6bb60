# SPDX-License-Identifier: Apache-2.0
"""Text that is given out while an answer is written never changes, and joined it is the whole answer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdllm
from fastdllm import registry, testing
from fastdllm.generation import stream_text
from fastdllm.text import AnswerText, TokenText, cut, is_cut, settled
from tests.examples import examples

MODELS = ("tiny-llada", "tiny-dream", "tiny-fast-dllm-v2")
MASK = -1
# A vocabulary whose tokens are bytes: parts of characters, letters, and a token without text.
BYTES = [b"a", b"b", b"c", b" ", b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xe2", b"\x82", b"\xac", b"\xff", b"ab", b""]
END = len(BYTES)


def spell(ids: list[int]) -> str:
    return b"".join(BYTES[i] for i in ids if i != END).decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def models() -> dict[str, fastdllm.Model]:
    return {name: fastdllm.load(name) for name in MODELS}


@given(st.lists(st.integers(0, len(BYTES) - 1), max_size=40), st.randoms(use_true_random=False))
def test_pieces_of_tokens_join_to_the_text_of_all(ids: list[int], rng: random.Random) -> None:
    text, at, joined = TokenText(spell), 0, ""
    while at < len(ids):
        step = rng.randint(1, 4)
        joined += text.feed(ids[at : at + step])
        assert spell(ids).startswith(joined)
        at += step
    assert joined + text.finish() == spell(ids)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_with_the_tokens_of_each_tokenizer(models: dict[str, fastdllm.Model], name: str) -> None:
    tokenizer, rng = models[name].tokenizer, random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(len(tokenizer)) for _ in range(30)]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        text = TokenText(lambda part: tokenizer.decode(part, skip_special_tokens=True))
        assert "".join(text.feed([token]) for token in ids) + text.finish() == whole


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[int], list[str], int]:
    ids = draw(st.lists(st.integers(0, END), min_size=1, max_size=24))
    whole = spell(ids)
    stops = draw(st.lists(st.text("abc €", min_size=1, max_size=4), max_size=3))
    if whole and draw(st.booleans()):
        at = draw(st.integers(0, len(whole) - 1))
        stops.append(whole[at : at + draw(st.integers(1, 4))])
    return ids, stops, draw(st.integers(1, 6))


@settings(max_examples=examples(400))
@given(answers(), st.randoms(use_true_random=False), st.booleans())
def test_what_is_given_out_is_final_in_order_and_before_every_stop(
    answer: tuple[list[int], list[str], int], rng: random.Random, revocable: bool
) -> None:
    ids, stops, block = answer
    before_end = ids[: ids.index(END)] if END in ids else ids
    expected = cut(spell(before_end), stops)
    text = AnswerText(spell, len(ids), MASK, (END,), stops, revocable=revocable)
    joined = ""
    for start in range(0, len(ids), block):
        now = [MASK] * len(ids[start : start + block])
        joined += text.step(start, list(now))
        if revocable:  # guesses that are taken back, also of the whole block
            for guess in ([rng.randint(0, END), *now[1:]], [rng.randint(0, END) for _ in now]):
                assert text.step(start, guess) == ""
            assert text.text == joined
        order = rng.sample(range(len(now)), len(now))
        for at in order:
            now[at] = ids[start + at]
            joined += text.step(start, list(now))
            joined += text.step(start, list(now))  # once more, as after a failed round
            assert expected.startswith(joined), "something was given out that is not part of the answer"
    joined += text.finish(ids)
    assert joined == expected == text.text
    assert text.ended == (END in ids or expected != spell(before_end))
    assert text.finish() == ""


@given(st.text("ab ", max_size=12), st.lists(st.text("ab ", min_size=1, max_size=3), min_size=1, max_size=3), st.text("ab "))
def test_settled_text_stays_before_every_later_cut(text: str, stops: list[str], more: str) -> None:
    sure, found = settled(text, stops)
    assert cut(text + more, stops).startswith(text[:sure])
    if found and is_cut(text, stops):
        assert cut(text + more, stops) == cut(text, stops)


def test_a_stop_token_before_a_constraint_ends_nothing() -> None:
    text = AnswerText(spell, 4, MASK, (END,), fixed={2: 1})
    assert text.step(0, [END, 0, 1, MASK]) == "ab"
    assert text.finish([END, 0, 1, END]) == "" and text.ended and text.tokens == 3


QUESTION = "Question: What is 3 + 4?\nAnswer:"
NEEDS = {"quota": {"steps": 16}}


@pytest.mark.parametrize("decoder", [d for d in registry.names("decoders") if testing.fits(d, "llada")])
def test_streamed_text_is_the_answer_under_every_decoder(models: dict[str, fastdllm.Model], decoder: str) -> None:
    options = {"gen_length": 48, "block_length": 16, "decoder": decoder, **NEEDS.get(decoder, {})}
    whole = fastdllm.generate(models["tiny-llada"], QUESTION, **options).texts[0]
    pieces = list(stream_text(models["tiny-llada"], QUESTION, **options))
    assert "".join(pieces) == whole and len(pieces) > 1 and all(pieces)


@pytest.mark.parametrize("name", MODELS)
def test_streamed_text_ends_before_a_stop_string(models: dict[str, fastdllm.Model], name: str) -> None:
    options = {"gen_length": 48}
    whole = fastdllm.generate(models[name], QUESTION, **options).texts[0]
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    assert "".join(stream_text(models[name], QUESTION, stop=stop, **options)) == whole[: whole.find(stop)]


def test_stream_text_follows_one_prompt(models: dict[str, fastdllm.Model]) -> None:
    with pytest.raises(ValueError, match="one prompt, not 2"):
        stream_text(models["tiny-llada"], ["a", "b"])
