# SPDX-License-Identifier: Apache-2.0
"""Words at token positions as the page's visitors type them: what is read, what is refused, and that reading ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdllm
from fastdllm.serving.words import next_item, parse_constraints
from tests.examples import examples

LONGEST = 4096  # characters that the page takes


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """A parser that tries every way to share out blanks would take days: end the test instead."""

    def late(*_: object) -> None:
        raise AssertionError("still reading after two minutes")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def model() -> fastdllm.Model:
    return fastdllm.load("tiny-llada", device="cpu")


@pytest.mark.parametrize(
    "text",
    [
        "1:" + " " * LONGEST + '"x',
        "1" + " " * LONGEST + "x",
        " " * LONGEST + "x",
        "1:a" + " " * LONGEST + '"',
        '1:"a"' + " " * LONGEST + "x",
        "1:a," + " " * LONGEST + "x",
        "1" * LONGEST + ":x",
        ":" * LONGEST,
        '"' * LONGEST,
        "1:\t\n" * LONGEST + '"',
    ],
)
def test_a_long_line_that_is_no_list_of_words_is_refused(model: fastdllm.Model, text: str) -> None:
    with pytest.raises(ValueError, match=r"constraints: .{1,60} is not of the form position:word"):
        parse_constraints(model, text, 64)


@pytest.mark.parametrize(
    "text, read",
    [
        ("5:apples, 12:left", (5, "apples", False, " 12:left")),
        ('  5 : " a, b" , 6:c', (5, " a, b", True, " 6:c")),
        ("0:a:b", (0, "a:b", False, "")),
        ("7:  two words  ,", (7, "two words", False, "")),
    ],
)
def test_the_first_word_of_a_line(text: str, read: tuple[int, str, bool, str]) -> None:
    assert next_item(text) == read


@pytest.mark.parametrize(
    "text", ["5", "5:", "5:,", ":a", "a:b", "-1:a", "²:a", "5:'a\"", '5:"a', '5:""', '5:"a"b', '5:a"b"']
)
def test_what_is_no_position_and_word_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        next_item(text)


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(st.text(alphabet='0123:," ab\t²é', max_size=40))
def test_any_line_is_read_or_refused(model: fastdllm.Model, text: str) -> None:
    try:
        fixed = parse_constraints(model, text, 64)
    except ValueError as error:
        assert str(error).startswith("constraints: ")
    else:
        assert all(0 <= at < 64 and 0 <= token < model.spec.vocab for at, token in fixed.items())
