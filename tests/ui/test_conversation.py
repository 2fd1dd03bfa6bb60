# SPDX-License-Identifier: Apache-2.0
"""Conversations: rendered anew every turn, trimmed with a notice, and never taking a user's text for a special token."""

from __future__ import annotations

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdllm import Model
from fastdllm.prompts import encode_literally, encode_messages, render
from fastdllm.ui.conversation import Conversation, clean
from tests.examples import examples


def with_template(model: Model, template: str | None) -> Model:
    other = copy.copy(model)
    other.tokenizer = copy.deepcopy(model.tokenizer)
    other.tokenizer.chat_template = template
    return other


@pytest.fixture
def talker(model: Model) -> Model:
    """The same model under a name of which nothing is known: the shipped one never sees an earlier turn."""
    other = copy.copy(model)
    other.name = "a-chat-model"
    return other


def test_a_shipped_model_gets_single_questions(model: Model) -> None:
    talk = Conversation()
    talk.add(talk.prompt(model, "How many?", 32), "Seven.")
    prompt = talk.prompt(model, "And now?", 32)
    assert model.tokenizer.decode(prompt.ids) == "<|user|>And now?<|assistant|>" and prompt.dropped == 2
    assert prompt.notices == ("this model knows single questions, so each one starts a new conversation",)
    talk.add(prompt, "Eight.")
    assert [m["content"] for m in talk.messages] == ["And now?", "Eight."]


def test_the_second_turn_is_the_template_over_all_messages(talker: Model) -> None:
    model = talker
    talk = Conversation()
    talk.add(talk.prompt(model, "How many?", 32), "Seven.")
    messages = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "And now?"},
    ]
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = talk.prompt(model, "And now?", 32)
    assert prompt.ids.tolist() == model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(talk.messages) == 2, "asking for a prompt changed the conversation"


def test_the_oldest_turns_go_when_the_context_is_full(talker: Model) -> None:
    model = talker
    talk = Conversation()
    for turn in range(12):
        prompt = talk.prompt(model, f"Question {turn}: " + "apples and pears " * 8, 200)
        assert len(prompt.ids) <= model.spec.max_length - 200
        assert bool(prompt.dropped) == any("context full" in text for text in prompt.notices)
        talk.add(prompt, "An answer.")
    assert prompt.dropped and talk.messages[0]["role"] == "user"
    assert talk.messages[-2]["content"].startswith("Question 11")


@pytest.mark.parametrize("text", ["", "   ", "\n\t\n"])
def test_an_empty_message_is_refused(model: Model, text: str) -> None:
    with pytest.raises(ValueError, match="message is empty"):
        Conversation().prompt(model, text, 32)


def test_a_message_that_cannot_fit_says_how_much_does(model: Model) -> None:
    talk = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(ValueError, match=r"too long: \d+ tokens.*only 480 fit.*512"):
        talk.prompt(model, "x" * 100_000, 32)
    assert len(talk.messages) == 2


def test_an_answer_that_cannot_fit_is_what_is_called_too_long(model: Model) -> None:
    size = len(Conversation().prompt(model, "a question", 32).ids)
    with pytest.raises(ValueError, match=f"answer of 511 tokens is too long.* at most {512 - size} more"):
        Conversation().prompt(model, "a question", 511)
    assert len(Conversation().prompt(model, "a question", 512 - size).ids) == size


# The model is only read, so that one for all examples is as good as a fresh one.
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60), st.sampled_from(["<|mask|>", "<|eos|>", "<|user|>", "<|assistant|>"]), st.text(max_size=60))
def test_no_text_of_a_user_is_a_special_token(model: Model, before: str, name: str, after: str) -> None:
    text = clean(before + name + after)
    special = set(model.tokenizer.get_added_vocab().values())
    ids = encode_messages(model, [{"role": "user", "content": text}]).tolist()
    template = encode_messages(model, [{"role": "user", "content": "x"}]).tolist()
    assert [t for t in ids if t in special] == [t for t in template if t in special]
    assert model.tokenizer.decode(ids) == f"<|user|>{text}<|assistant|>"
    assert not special & set(encode_literally(model, text))


def test_a_message_without_special_names_is_encoded_as_rendered(model: Model) -> None:
    messages = [{"role": "user", "content": "Emoji 😀, control \x00\x1b[31m, and a tab\t."}]
    expected = model.tokenizer(render(model, messages), add_special_tokens=False)["input_ids"]
    assert encode_messages(model, messages).tolist() == expected


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert clean("a\ud83db\n") == "a?b"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m['role'] == 'user' %}U:{{ m['content'] }}{% endif %}{% endfor %}A:",
        "{% set first = messages[0] %}{% if first['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "U:{{ first['content'] }}",
    ],
    ids=["silent", "raising"],
)
def test_a_template_without_a_system_role_gets_the_text_in_the_first_message(model: Model, template: str) -> None:
    other = with_template(model, template)
    prompt = Conversation(system="Be brief.").prompt(other, "Why?", 32)
    assert "Be brief.\n\nWhy?" in other.tokenizer.decode(prompt.ids)
    assert any("no system role" in text for text in prompt.notices)


def test_a_template_with_a_system_role_is_used_without_a_notice(model: Model) -> None:
    other = with_template(model, "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}")
    prompt = Conversation(system="Be brief.").prompt(other, "Why?", 32)
    assert other.tokenizer.decode(prompt.ids) == "system:Be brief.;user:Why?;" and prompt.notices == ()


def test_a_base_model_continues_the_text_and_says_so(model: Model) -> None:
    prompt = Conversation().prompt(with_template(model, None), "Once upon", 32)
    assert model.tokenizer.decode(prompt.ids) == "Once upon"
    assert any("no chat template" in text for text in prompt.notices)
