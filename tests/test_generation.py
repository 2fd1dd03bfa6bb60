# SPDX-License-Identifier: Apache-2.0
"""`generate`, `stream` and `stream_text` as users of other libraries call them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm import generation, threads
from fastdllm.memory import bytes_per_position, positions_that_fit
from tests.random_models import STOP, prompts, random_model

TEXT = "A student has 23 pencils. His sister has 7 fewer pencils than he has. How many pencils do they have together?"
QUESTION = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def model() -> fastdllm.Model:
    return fastdllm.load("tiny-llada", device="cpu")


@pytest.fixture(scope="module")
def whole(model: fastdllm.Model) -> str:
    return fastdllm.generate(model, QUESTION, gen_length=64).texts[0]


@pytest.mark.parametrize("name", ["stop", "stop_strings", "until"])
def test_a_stop_string_ends_the_answer_before_it(model: fastdllm.Model, whole: str, name: str) -> None:
    stop = whole[12:15]
    stops = {name: [stop, "never"]}
    full = fastdllm.generate(model, QUESTION, gen_length=64, block_length=8)
    out = fastdllm.generate(model, QUESTION, gen_length=64, block_length=8, **stops)
    expected = full.texts[0][: full.texts[0].find(stop)]
    assert out.texts == [expected] and out.finish_reasons == ["stop"]
    assert out.stats.forwards < full.stats.forwards, "decoding ends with the block of the stop string"
    prompt = len(fastdllm.encode(model, QUESTION)[0])
    kept = model.tokenizer.decode(out.sequences[0][prompt:])
    assert stop in kept and stop not in model.tokenizer.decode(out.sequences[0][prompt:-1])
    assert len(out.logprobs[0]) == len(out.committed_at[0]) == len(out.sequences[0]) - prompt
    steps = list(fastdllm.stream(model, QUESTION, gen_length=64, block_length=8, **stops))
    assert len(steps) == out.stats.forwards
    pieces = fastdllm.stream_text(model, QUESTION, gen_length=64, block_length=8, **stops)
    assert "".join(pieces) == expected


@pytest.mark.parametrize("at", [100, 40, 9])
def test_blocks_that_a_stop_string_makes_unneeded_are_no_tokens(model: fastdllm.Model, whole: str, at: int) -> None:
    """Whether a fixed token stands in them or not. The text of `stream_text`, and of the server, counts the same."""
    stop, token = whole[12:15], fastdllm.encode(model, " 5")[0][-1]
    options: dict[str, Any] = {"gen_length": 128, "block_length": 8, "constraints": {at: int(token)}}
    out = fastdllm.generate(model, QUESTION, stop=stop, **options)
    decoded = 8 * len({step.starts[0] for step in fastdllm.stream(model, QUESTION, stop=stop, **options)})
    assert out.finish_reasons == ["stop"] and out.stats.tokens == decoded < 100
    prompt = len(fastdllm.encode(model, QUESTION)[0])
    assert model.spec.mask_id not in out.sequences[0] and len(out.sequences[0]) <= prompt + decoded
    config = fastdllm.DecodeConfig(**{name: value for name, value in options.items() if name != "constraints"})
    call = generation.call_of(model, fastdllm.encode(model, QUESTION), config, options["constraints"], stop, 1)
    answer = generation.answer_text(call)
    [result] = [step.done[0] for step in call.steps(trace=False) if step.done]
    answer.finish(result.ids[prompt:].tolist())
    assert (answer.text, answer.tokens, answer.ended) == (out.texts[0], out.stats.tokens, True)


@pytest.mark.parametrize("stop", ["", [], [""], None])
def test_an_empty_stop_string_says_nothing(model: fastdllm.Model, whole: str, stop: Any) -> None:
    assert fastdllm.generate(model, QUESTION, gen_length=64, stop=stop).texts == [whole]


def test_every_answer_says_why_it_ended(model: fastdllm.Model) -> None:
    assert fastdllm.generate(model, QUESTION, gen_length=64).finish_reasons == ["stop"]
    assert fastdllm.generate(model, QUESTION, gen_length=8).finish_reasons == ["length"]
    assert fastdllm.generate(model, QUESTION, gen_length=64, stop_ids=()).finish_reasons == ["length"]
    # A stop token at the very last position ends the answer all the same.
    random = random_model()
    out = fastdllm.generate(random, prompts(5), gen_length=8, constraints={7: STOP})
    assert out.finish_reasons == (["stop"] if STOP in out.sequences[0][5:12] else ["length"])


def test_several_answers_to_a_prompt_lie_side_by_side_and_draw_apart() -> None:
    model, given = random_model(), prompts(5, 9)
    out = fastdllm.generate(model, given, num_return_sequences=3, temperature=1.0, gen_length=16, stop_ids=())
    assert [len(s) for s in out.sequences] == [21] * 3 + [25] * 3
    assert len({tuple(s.tolist()) for s in out.sequences}) == 6
    same = fastdllm.generate(model, [p for p in given for _ in range(3)], temperature=1.0, gen_length=16, stop_ids=())
    assert all(torch.equal(a, b) for a, b in zip(out.sequences, same.sequences, strict=True))
    assert len(fastdllm.generate(model, given[0], n=2, confidence="random", decoder="quota", gen_length=8).sequences) == 2
    with pytest.raises(ValueError, match="num_return_sequences=2 would give the same answer"):
        fastdllm.generate(model, given, num_return_sequences=2, gen_length=8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stop": [3]}, "stop=.3. must be a text or a list of texts"),
        ({"stop": "a", "until": "b"}, "are the same option"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 must lie in"),
        ({"num_return_sequences": 1.5}, "num_return_sequences=1.5 must be"),
        ({"n": 10**9, "temperature": 1.0}, "num_return_sequences=1000000000 must lie in"),
        ({"n": 10**30, "temperature": 1.0}, "num_return_sequences=10+ must lie in"),
        ({"max_tokens": 8, "gen_length": 9}, "are the same option"),
        ({"streamer": 1}, "fastdllm.stream_text yields text"),
        ({"treshold": 0.5}, "did you mean 'threshold'"),
        ({"stop": 5}, "stop=5 must be a text or a list of texts"),
        ({"stop": b"x"}, "stop=b'x' must be a text"),
        ({"stop": {"a": 1}}, "stop=.* must be a text"),
        ({"stop": torch.ones(2)}, "stop=tensor.* must be a text"),
        ({"stop": False}, "stop=False must be a text"),
        ({"config": {"gen_length": 8}}, "config=.* must be a DecodeConfig"),
        ({"constraints": 5}, "constraints=5 must be a dict"),
        ({"constraints": "x"}, "constraints='x' must be a dict"),
        ({"constraints": ["x"]}, "the entry 'x'; it must be a dict"),
        ({"constraints": {"0": 5}}, "'0' must be of type int"),
        ({"constraints": {0: "yes"}}, "'yes' must be of type int"),
        ({"constraints": {0: 5.0}}, "5.0 must be of type int"),
        ({"constraints": {True: 5}}, "True must be of type int"),
        ({"constraints": {0: None}}, "None must be of type int"),
        ({"stop_ids": (-1,)}, "stop_ids: -1 is none of the model's token ids"),
        ({"stop_ids": (2, 10**9)}, "stop_ids: 1000000000 is none of the model's token ids"),
    ],
)
def test_bad_arguments_are_named(model: fastdllm.Model, options: dict[str, Any], expected: str) -> None:
    """Of `stream` at the call, where the mistake is, and not where its steps are read."""
    for function in (fastdllm.generate, fastdllm.stream):
        with pytest.raises(ValueError, match=expected):
            function(model, QUESTION, **options)


@pytest.mark.parametrize("options", [{"treshold": 0.5}, {"stop_ids": (-1,)}, {"gen_length": 10**6}, {"threshold": "x"}])
def test_what_is_iterated_is_checked_before(model: fastdllm.Model, options: dict[str, Any]) -> None:
    for function in (fastdllm.stream, fastdllm.stream_text, fastdllm.watch):
        with pytest.raises(ValueError, match=next(iter(options))):
            function(model, QUESTION, **options)


def test_what_a_tokenizer_returns_may_be_passed_by_its_names(model: fastdllm.Model) -> None:
    """As in transformers: generate(**inputs)."""
    assert model.tokenizer is not None
    inputs = model.tokenizer([TEXT, "A pencil"], padding=True, return_tensors="pt")
    expected = fastdllm.generate(model, inputs, gen_length=16).sequences
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)  # older tokenizers add token_type_ids
    for given in (inputs, {"input_ids": [ids[mask.bool()] for ids, mask in rows]}):
        found = fastdllm.generate(model, **{"token_type_ids": torch.zeros(2, 2)} | dict(given), gen_length=16).sequences
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert len(list(fastdllm.stream(model, **inputs, gen_length=16))) > 0
    one = {"input_ids": inputs["input_ids"][1:], "attention_mask": inputs["attention_mask"][1:].float()}
    text = "".join(fastdllm.stream_text(model, **one, token_type_ids=torch.zeros(1, 2), gen_length=16))
    assert text == fastdllm.generate(model, "A pencil", gen_length=16).texts[0]
    assert [*fastdllm.watch(model, **one, gen_length=16)][-1].prompt_length == int(one["attention_mask"].sum())
    for follow in (fastdllm.generate, fastdllm.stream, fastdllm.stream_text, fastdllm.watch):
        with pytest.raises(ValueError, match="prompts is missing"):
            list(follow(model, gen_length=16))
        with pytest.raises(ValueError, match="prompts and input_ids are two names"):
            list(follow(model, QUESTION, input_ids=inputs["input_ids"]))


@pytest.mark.parametrize("follow", [fastdllm.generate, fastdllm.stream, fastdllm.stream_text, fastdllm.watch])
@pytest.mark.parametrize("options", [{"config": 5}, {"constraints": {"0": 5}}, {"constraints": {0: "yes"}}])
def test_every_way_in_refuses_the_same(model: fastdllm.Model, follow: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be"):
        list(follow(model, QUESTION, **options))


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        fastdllm.generate(random_model(), prompts(5), stop="x", gen_length=8)


def test_padded_ids_with_their_mask_are_what_a_tokenizer_returns(model: fastdllm.Model, whole: str) -> None:
    ids = fastdllm.encode(model, QUESTION)[0]
    padded = torch.nn.functional.pad(ids, (4, 0), value=model.spec.pad_id)[None]
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    assert fastdllm.generate(model, padded, attention_mask=mask, gen_length=64).texts == [whole]


def test_a_bar_counts_answers(capsys: pytest.CaptureFixture) -> None:
    given = prompts(5, 6, 7)
    fastdllm.generate(random_model(), given, gen_length=8)
    assert capsys.readouterr().err == ""
    fastdllm.generate(random_model(), given, gen_length=8, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_memory_bounds_how_many_prompts_share_the_canvas(monkeypatch: pytest.MonkeyPatch) -> None:
    """And changes no answer."""
    model, given = random_model(), prompts(*range(5, 25))
    free = fastdllm.generate(model, given, gen_length=8)
    room = 2 * 64
    monkeypatch.setattr("fastdllm.memory._available", lambda: 4 * room * bytes_per_position(model))
    assert positions_that_fit(model, 20) == room
    widest = 0
    for step in fastdllm.stream(model, given, gen_length=8):
        widest = max(widest, len(step.rows))
    tight = fastdllm.generate(model, given, gen_length=8)
    assert widest <= 4, "rows of 32 positions at least"
    assert [s.tolist() for s in tight.sequences] == [s.tolist() for s in free.sequences]
    many = fastdllm.generate(model, given, gen_length=8, batch_size=20)
    assert many.stats.forwards == free.stats.forwards < tight.stats.forwards, "a given batch_size stands"


def test_without_a_batch_size_no_more_than_the_usual_rows_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "ROWS", 3)
    assert max(len(step.rows) for step in fastdllm.stream(random_model(), prompts(*[5] * 8), gen_length=8)) == 3


def test_threads_follow_the_size_of_the_model_and_a_choice_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 8
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "MOST", 8)
    monkeypatch.setattr(threads, "_chosen", {8})
    monkeypatch.setattr(torch, "get_num_threads", lambda: now)

    def change(count: int) -> None:
        nonlocal now
        now = count

    monkeypatch.setattr(torch, "set_num_threads", change)
    assert [threads.threads_for(n) for n in (0, 6_000_000, 60_000_000, 8_000_000_000)] == [1, 1, 2, 8]
    model = random_model()
    fastdllm.generate(model, prompts(4), gen_length=8)
    assert now == 1
    large = copy.copy(model)
    large.network = copy.copy(model.network)
    monkeypatch.setattr(threads, "PARAMETERS", 1)
    fastdllm.log_likelihoods(large, [(prompts(4)[0], prompts(4)[0])], mc_num=1)
    assert now == 8
    monkeypatch.setattr(threads, "PARAMETERS", 25_000_000)
    now = 5
    fastdllm.generate(model, prompts(4), gen_length=8)
    assert now == 5, "torch.set_num_threads has the say"
    now = 8
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    fastdllm.generate(model, prompts(4), gen_length=8)
    assert now == 8, "OMP_NUM_THREADS has the say"
