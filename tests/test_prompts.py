# SPDX-License-Identifier: Apache-2.0
"""From what people pass to token ids: every shape that other libraries take, and a sentence for all the rest."""

from __future__ import annotations

import random
import sys
import threading
import time
import warnings
from collections import UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdllm
from fastdllm import templates
from fastdllm.conversations import encode_conversation, encode_messages, encode_text, escape, render
from fastdllm.models import Model
from fastdllm.prompts import encode
from tests.examples import examples

TEXT = "Ann has 3 apples."
ASK = [{"role": "user", "content": TEXT}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Model:
    return fastdllm.load("tiny-llada", "cpu")


@pytest.fixture(scope="module")
def v2() -> Model:
    return fastdllm.load("tiny-fast-dllm-v2", "cpu")


def ids(model: Model, prompts: Any, *rest: Any) -> list[list[int]]:
    return [one.tolist() for one in encode(model, prompts, *rest)]


def test_a_conversation_is_one_prompt_in_every_spelling(model: Model) -> None:
    (expected,) = ids(model, [ASK])
    parts = [{"role": "user", "content": [{"type": "text", "text": TEXT[:5]}, {"type": "text", "text": TEXT[5:]}]}]
    for spelling in (ASK, tuple(ASK), [UserDict(ASK[0])], parts, [parts], (ASK,)):
        assert ids(model, spelling) == [expected]
    assert ids(model, [ASK, parts]) == [expected] * 2
    assert ids(model, [ASK, TEXT]) == [expected, encode_text(model, TEXT)]


def test_ids_come_in_every_container(model: Model) -> None:
    for one in ([5, 6, 7], (5, 6, 7), np.array([5, 6, 7]), np.array([5, 6, 7], np.uint16), torch.tensor([5, 6, 7])):
        assert ids(model, one) == ids(model, [one]) == [[5, 6, 7]]
        assert ids(model, [one, [8]]) == [[5, 6, 7], [8]]
    for two in ([[5, 6], [7, 8]], np.array([[5, 6], [7, 8]]), torch.tensor([[5, 6], [7, 8]], dtype=torch.int32)):
        assert ids(model, two) == [[5, 6], [7, 8]]
    assert ids(model, [np.int64(5), 6]) == ids(model, [torch.tensor([[5, 6]])]) == [[5, 6]]
    assert ids(model, np.array(["far", "away"])) == ids(model, ["far", "away"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["pt", "np", None])
def test_what_a_tokenizer_returns_loses_its_padding(model: Model, side: str, kind: str | None) -> None:
    texts = ["far away", TEXT, "one"]
    tokenizer = model.tokenizer
    pad, before = tokenizer.pad_token, tokenizer.padding_side
    tokenizer.pad_token, tokenizer.padding_side = pad or tokenizer.eos_token, side
    encoding = tokenizer(texts, padding=True, return_tensors=kind, add_special_tokens=False)
    single = tokenizer(TEXT, add_special_tokens=False)
    tokenizer.padding_side = before
    expected = [encode_text(model, text) for text in texts]
    assert ids(model, encoding) == ids(model, dict(encoding)) == expected
    assert ids(model, encoding["input_ids"], encoding["attention_mask"]) == expected
    assert ids(model, single) == ids(model, [single]) == [expected[1]]
    assert ids(model, [single, single]) == [expected[1]] * 2


def test_the_idioms_of_transformers_give_the_answer_of_the_text(model: Model) -> None:
    chat = {"add_generation_prompt": True, "return_tensors": "pt"}
    (expected,) = ids(model, ASK)
    assert ids(model, model.tokenizer.apply_chat_template(ASK, return_dict=True, **chat)) == [expected]
    assert ids(model, model.tokenizer.apply_chat_template(ASK, return_dict=False, **chat)) == [expected]
    out = fastdllm.generate(model, model.tokenizer([TEXT], return_tensors="pt", add_special_tokens=False), gen_length=8)
    assert out.texts == fastdllm.generate(model, TEXT, gen_length=8).texts


MESSAGE = {"role": "user", "content": "hi"}
REFUSED = [
    (None, "prompts is None; allowed are a text"),
    (3, "prompts is an int"),
    (b"bytes", "prompts is a bytes"),
    ([b"bytes"], "prompt 0 is a bytes"),
    ({"a"}, "prompts is a set"),
    ((c for c in "ab"), "prompts is a generator"),
    (MESSAGE, "prompts is one message; pass a list of messages"),
    ({"prompt": "hi"}, "prompts is a dict with the keys prompt; allowed"),
    ([{"prompt": "hi"}], "prompt 0 is a dict with the keys prompt"),
    ([["a", "b"]], "prompt 0 is a list of str"),
    ([[["a"]]], "prompt 0 is a list of list"),
    (["a", 1], "prompt 1 is an int"),
    (["a", None], "prompt 1 is None"),
    ([1, True], "prompt 0 is an int"),
    ([1.0, 2.0], "prompt 0 is a float"),
    ([[1.0]], "prompt 0 is a list of float"),
    ([[1, 2], "x", []], "prompt 2 is an empty list"),
    ("", "a prompt is empty"),
    ([], "prompts is empty"),
    (torch.ones(2), r"prompts is a Tensor of shape \[2\] and type torch.float32; token ids are integers"),
    (torch.ones(2, dtype=torch.bool), "token ids are integers"),
    (torch.ones(2, dtype=torch.complex64), "token ids are integers"),
    (torch.ones(1, 2, 3, dtype=torch.long), r"Tensor of shape \[1, 2, 3\] .*ids are \[P\] or \[B, P\]"),
    (torch.tensor(3), r"ids are \[P\] or \[B, P\]"),
    ([torch.ones(2, 3, dtype=torch.long)], "prompt 0 is a Tensor"),
    (np.ones(2), "token ids are integers"),
    (np.array([True]), "token ids are integers"),
    (np.array([None]), "token ids are integers"),
    ([2**70], "outside the vocabulary"),
    ([-1], "token ids outside"),
    ([10**6], "token ids outside"),
    ("a\ud800b", r"lone surrogate \(\\ud800\) at position 1"),
    ([{"role": "user", "content": "\udfff"}], "message 0 has a lone surrogate"),
    ([{"role": "user"}], r"message 0 \(role 'user'\) has no content; allowed are a text and a list of text parts"),
    ([{"content": "x"}], "message 0 has no role"),
    ([{"role": 3, "content": "x"}], "message 0 has no role"),
    ([{"role": "user", "content": None}], "content of type NoneType"),
    ([{"role": "user", "content": 7}], "content of type int"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "content part of type 'image_url'"),
    ([{"role": "user", "content": ["x"]}], "content part of type 'str'"),
    ([[MESSAGE, "hi"]], "message 1 is a str; a message is a dict"),
    ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask has rows of"),
    ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask has a gap in row 0"),
    ({"input_ids": [1, 2], "attention_mask": [2, 1]}, "values other than 0 and 1"),
    ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "a prompt is empty"),
    ({"input_ids": ["a"]}, "input_ids is a list of str"),
    ({"input_ids": None}, "input_ids is None"),
    ({"input_ids": [[[1]]]}, "input_ids is a list of list"),
]


@pytest.mark.parametrize(("prompts", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_is_no_prompt_is_refused_by_its_kind(model: Model, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(model, prompts)


FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8]


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_a_mask_may_be_of_any_numbers(model: Model, kind: torch.dtype) -> None:
    """Also of floats, as transformers takes it, where each is 0 or 1."""
    rows, mask = torch.tensor([[0, 0, 5], [6, 7, 8]]), torch.tensor([[0, 0, 1], [1, 1, 1]]).to(kind)
    forms = [mask, mask.tolist(), list(mask), tuple(map(tuple, mask.tolist()))]
    forms += [mask.numpy(), list(mask.numpy()), [list(row) for row in mask.numpy()]] if kind != torch.bfloat16 else []
    for form in forms:
        assert ids(model, rows, form) == ids(model, {"input_ids": rows, "attention_mask": form}) == [[5], [6, 7, 8]]
    assert ids(model, [5, 6, 7], mask[0]) == ids(model, [5, 6, 7], mask[0].tolist()) == [[7]]


@pytest.mark.parametrize("value", [0.5, -1.0, float("-inf"), float("nan"), 2**70, 1j, "1", None, [[1]]], ids=str)
@pytest.mark.parametrize("form", [list, torch.tensor, np.array])
def test_a_mask_of_other_values_is_refused_as_a_mask(model: Model, value: Any, form: Any) -> None:
    """0 and -inf are a mask of transformers' inside, in which 0 is not padding."""
    try:
        mask = form([[1, value, 1]]) if form is list else form([1.0, value, 1.0])
    except (TypeError, ValueError, RuntimeError):
        pytest.skip("there is no such mask")
    for call in (
        lambda: encode(model, [[5, 6, 7]], mask),
        lambda: encode(model, {"input_ids": [5, 6, 7], "attention_mask": mask}),
    ):
        with pytest.raises(ValueError, match=r"^attention_mask (is|has) .*; a mask ") as error:
            call()
        assert "ids" not in str(error.value)


def test_a_message_nested_too_deep_is_refused(model: Model) -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="message 0 is nested too deep"):
        encode(model, [{"role": "user", "content": "x", "tool_calls": deep}])


def test_a_mask_goes_with_ids(model: Model) -> None:
    with pytest.raises(ValueError, match="input_ids is a str"):
        encode(model, "text", torch.ones(1, 4))
    with pytest.raises(ValueError, match="attention_mask is given twice"):
        encode(model, {"input_ids": [1]}, [1])


def test_what_is_no_model_is_refused_with_the_way_to_one(v2: Model) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with pytest.raises(ValueError, match=r"model='tiny-llada' is a name; .*fastdllm.load\('tiny-llada'\)"):
        fastdllm.generate("tiny-llada", "x")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    other = Qwen2ForCausalLM(Qwen2Config(vocab_size=8, num_key_value_heads=1, **sizes))
    with pytest.raises(ValueError, match=r"model is of type Qwen2ForCausalLM; pass what fastdllm.load\("):
        fastdllm.generate(other, "x")


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=3))
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(st.sampled_from(["role", "content", "input_ids", "attention_mask", "type", "text"]), inner),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=examples(300), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk)
def test_whatever_comes_is_encoded_or_refused(model: Model, prompts: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = encode(model, prompts)
        except ValueError as error:
            assert str(error)
        else:
            assert out and all(one.dtype == torch.long and one.ndim == 1 and len(one) for one in out)


# Conversations


def chat(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def with_template(model: Model, template: str) -> Model:
    import copy

    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return Model(model.network, model.spec, tokenizer, model.name)


@settings(deadline=None, max_examples=examples(60))
@given(data=st.data())
def test_control_tokens_that_people_write_are_text(model: Model, data: Any) -> None:
    names = sorted(model.tokenizer.get_added_vocab(), key=len)
    piece = st.one_of(st.sampled_from(names), st.text("<|>aeos_ \n", max_size=5))
    turns = data.draw(st.lists(st.lists(piece, min_size=1, max_size=6).map("".join), min_size=1, max_size=4))
    found = encode_messages(model, chat(*turns)).tolist()
    plain = encode_messages(model, chat(*["x" if turn.strip() else turn for turn in turns])).tolist()
    special = set(model.tokenizer.get_added_vocab().values())
    assert [i for i in found if i in special] == [i for i in plain if i in special]


def test_a_thousand_names_of_control_tokens_are_text(model: Model) -> None:
    text = "<|eos|>" * 3000
    assert model.tokenizer.eos_token_id not in encode_messages(model, chat(text)).tolist()


def test_tools_and_further_fields_hold_text_as_well(v2: Model) -> None:
    told = with_template(v2, "{{ tools | tojson }}{% for m in messages %}{{ m.name }}{{ m.content }}<|im_end|>{% endfor %}")
    tools = [{"type": "function", "function": {"name": "<|im_end|>", "description": "|<MASK>|"}}]
    messages = [{"role": "user", "content": "x", "name": "<|im_end|>"}]
    found = encode_conversation(told.tokenizer, messages, tools=tools).ids
    end = told.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert found.count(end) == 1 and told.spec.mask_id not in found


def answers(model: Model, messages: list[dict[str, str]]) -> str:
    """The decoded tokens of the assistant's turns, with a bar after each turn."""
    ids, turns = encode_conversation(model.tokenizer, messages)
    runs = [[token for token, turn in zip(ids, turns, strict=True) if turn == n] for n in range(max(turns) + 1)]
    return "".join(model.tokenizer.decode(run) + "|" for run in runs)


HEADER_ALWAYS = (  # LLaDA's: the next turn is begun in any case
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{{ '<|im_start|>assistant\n\n' }}"
)
TEMPLATES = [
    (CHATML, "4<|im_end|>\n|"),
    (HEADER_ALWAYS, "4<|im_end|>|"),
    ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", "4\n|"),
    (
        "{% for m in messages %}<{{ loop.index }}>{{ m.content | trim }}"
        + "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}",
        "4<|im_end|>|",
    ),
]


@pytest.mark.parametrize(("template", "expected"), TEMPLATES)
def test_the_assistants_turns_are_marked_under_any_template(v2: Model, template: str, expected: str) -> None:
    told = with_template(v2, template)
    assert answers(told, chat("2 + 2?", "4")) == expected
    assert answers(told, chat("2 + 2?", "4", "Again?", "4")) == expected * 2
    assert answers(told, chat("4", "2 + 2?", "4", first="assistant")) == expected * 2, "the assistant may begin"
    assert answers(told, chat("4", "4 4", "x")) == expected.replace("4", "4 4")
    assert answers(told, chat("no answer")) == ""


@pytest.mark.parametrize("template", [CHATML, HEADER_ALWAYS])
def test_a_prompt_has_the_tokens_it_is_trained_with(v2: Model, template: str) -> None:
    told = with_template(v2, template)
    messages = chat("2 + 2?", " 4\n", "  And 3?\n", "6")
    encoded = encode_conversation(told.tokenizer, messages)
    ids, answer = encoded.ids, encoded.answer
    for end in (1, 3):
        prompt = encode_messages(told, messages[:end]).tolist()
        assert ids[: len(prompt)] == prompt
        assert answer[len(prompt)] and not answer[len(prompt) - 1]
    assert len(ids) == len(answer)


def test_ordinary_conversations_have_the_ids_that_transformers_gives(v2: Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat("What is 2 + 2?", "It is 4.", "Sure?")]
    for told in (v2, with_template(v2, CHATML)):
        expected = told.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if told is v2 and "Be brief" not in render(v2, messages):
            continue
        assert encode_messages(told, messages).tolist() == expected


def test_a_system_text_that_the_template_drops_goes_into_the_first_turn(model: Model, v2: Model) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    messages = [{"role": "system", "content": "Be brief."}, *ASK]
    folded = [{"role": "user", "content": f"Be brief.\n\n{TEXT}"}]
    for told in (model, with_template(v2, refusing)):
        with pytest.warns(UserWarning, match="no system role"):
            assert ids(told, messages) == ids(told, folded)
        with pytest.warns(UserWarning, match="no system role"):
            assert render(told, messages) == render(told, folded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Be brief." in render(with_template(v2, CHATML), messages)
        assert ids(model, ASK)


def test_any_other_message_that_a_template_drops_is_named(model: Model) -> None:
    with pytest.warns(UserWarning, match=r"leaves out message 1 \(role 'tool'\)"):
        encode(model, [*ASK, {"role": "tool", "content": "42"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[9].content }}", "fails: UndefinedError"),
        ("{% for %}", "fails: TemplateSyntaxError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError"),
        ("{{ 'x'.center(1000000000000) }}", "fails: MemoryError"),
        ("{{ 'x' * 20000 }}", "makes 20000 characters of a conversation; at most 10000"),
        ("{{ 9 ** 9 ** 9 }}", r"computes powers \(\*\*\)"),
        ("{% for i in range(10**12) %}{% endfor %}", r"computes powers \(\*\*\)"),
        ("{% for i in range(1000000000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_is_named(v2: Model, monkeypatch: pytest.MonkeyPatch, template: str, message: str) -> None:
    monkeypatch.setattr(templates, "LONGEST", 10_000)
    with pytest.raises(ValueError, match=rf"(?s)the chat template.*{message}"):
        encode(with_template(v2, template), ASK)


LOOPS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set l = range(99999) | list %}{% for i in l %}{% for j in l %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "filters": "{% set l = range(99999) | list %}{% for i in l %}{{ l | map('string') | join | length }}{% endfor %}",
}


@pytest.mark.parametrize("template", LOOPS.values(), ids=list(LOOPS))
def test_a_template_that_does_not_end_is_stopped(v2: Model, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    """In any thread; what the thread does next is not touched."""
    endless, good = with_template(v2, template), with_template(v2, CHATML)
    expected = ids(good, ASK)

    def ask() -> None:
        with pytest.raises(ValueError, match=r"fails: TimeoutError: it has not ended within 0\.2 s"):
            encode(endless, ASK)

    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(templates, "SECONDS", 0.2)
            asked = [pool.submit(ask) for _ in range(2)]
            ask()
            assert [future.result() for future in asked] == [None, None]
        assert [future.result() for future in [pool.submit(ids, good, ASK) for _ in range(4)]] == [expected] * 4
    assert ids(good, ASK) == expected


class Slow:
    def __del__(self) -> None:
        ready = time.monotonic() + 0.5
        while time.monotonic() < ready:
            pass


class Templates:
    """A tokenizer whose template is `work`."""

    chat_template = "{{ messages }}"

    def __init__(self, work: Callable[[], str]) -> None:
        self.work = work

    def apply_chat_template(self, *args: Any, **options: Any) -> str:
        return self.work()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_a_destructor_swallowed_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> str:
        Slow()
        while True:
            pass

    monkeypatch.setattr(templates, "SECONDS", 0.1)
    with pytest.raises(TimeoutError, match="not ended"):
        templates.rendered(Templates(endless), ASK, None, prompt=True)


def test_no_interruption_outlives_its_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that comes while the rendering begins or ends; a thread that begins later may have the same number."""

    def work() -> str:
        return "x" * sum(1 for _ in range(random.randrange(20_000)))

    def ask() -> None:
        for _ in range(50):
            with suppress(TimeoutError):
                templates.rendered(Templates(work), ASK, None, prompt=True)

    # One in a destructor is dropped. pytest reports that, so slowly that the next would come within the report.
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)
    monkeypatch.setattr(templates, "SECONDS", 0.0002)
    monkeypatch.setattr(templates, "AGAIN", 0.001)
    for _ in range(10):
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(ask) for _ in range(2)]:
                done.result()
    ends = time.monotonic() + 0.1
    while time.monotonic() < ends:
        pass
    left = [thread for thread in threading.enumerate() if "watch" in thread.name]
    for thread in left:
        thread.join(600)
        assert not thread.is_alive()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how large a process is")
@pytest.mark.parametrize(
    "grow",
    ["{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = ns.x.replace('a', 'aa') %}", "{% set ns.x = [ns.x, ns.x] | join %}"],
)
def test_a_template_that_fills_the_memory_is_stopped(v2: Model, monkeypatch: pytest.MonkeyPatch, grow: str) -> None:
    """A text of half a GiB here, and then loops; it would go on to forty doublings."""
    monkeypatch.setattr(templates, "MEMORY", 2**26)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% set ns = namespace(x='a' * 1024) %}}{{% for i in range(19) %}}{grow}{{% endfor %}}{endless}"
    with pytest.raises(ValueError, match="fails: MemoryError: it takes more than 64 MiB"):
        encode(with_template(v2, template), ASK)


def test_a_rendering_that_ends_in_time_is_never_interrupted(v2: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the time runs out while it ends: either answer is right, and nothing is raised later."""
    told = with_template(v2, "{% for i in range(200) %}{% for j in range(200) %}{% endfor %}{% endfor %}" + CHATML)
    expected, outcomes = render(with_template(v2, CHATML), ASK), set()
    monkeypatch.setattr(templates, "SECONDS", 0.004)
    for _ in range(200):
        try:
            outcomes.add(render(told, ASK))
        except ValueError as error:
            outcomes.add("late" if "not ended" in str(error) else str(error))
    time.sleep(0.02)
    assert outcomes <= {"late", expected}


def test_stars_that_are_no_powers_are_allowed(v2: Model) -> None:
    stars = "{% macro f() %}{{ kwargs | length }}{% endmacro %}** {{ '**' }} {{ f(**{'a': 1}) }} {{ f(a=1, ** {'b': 2}) }}"
    with pytest.warns(UserWarning, match="leaves out message 0"):
        assert render(with_template(v2, stars), ASK) == "** ** 1 2"


def test_escaped_names_read_as_text_and_nothing_else_changes(model: Model) -> None:
    name = model.tokenizer.eos_token
    assert escape(model.tokenizer, "far away") == "far away"
    ids = encode_text(model, escape(model.tokenizer, f"far{name} away"))
    assert model.tokenizer.eos_token_id not in ids and model.tokenizer.decode(ids) == f"far{name} away"
