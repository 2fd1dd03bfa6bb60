# SPDX-License-Identifier: Apache-2.0
"""OpenAI's own client against a real server process: every endpoint, streaming, errors, and how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
import torch

import fastdllm
from tests.serving.conftest import QUESTION, free_port, running

openai = pytest.importorskip("openai", reason="a test dependency")
MESSAGES = [{"role": "user", "content": QUESTION}]
LONG = "Question: What is 3 + 4?\nAnswer:"


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=600)


def post(url: str, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return response.status, json.loads(response.read()), response.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=600) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def settled(url: str) -> None:
    """Nothing runs and nothing waits."""
    end = time.monotonic() + 60
    while metric(url, "fastdllm_running") or metric(url, "fastdllm_waiting"):
        assert time.monotonic() < end
        time.sleep(0.05)


def offline(model: fastdllm.Model, **options: Any) -> str:
    return fastdllm.generate(model, [MESSAGES], **options).texts[0]


def test_a_chat_answer_is_the_one_that_python_gives(client: Any, model: fastdllm.Model) -> None:
    done = client.chat.completions.create(model="tiny-llada", messages=MESSAGES, max_tokens=128)
    choice = done.choices[0]
    out = fastdllm.generate(model, [MESSAGES], gen_length=128)
    assert choice.message.content == out.texts[0] and choice.finish_reason == "stop"
    assert done.usage.completion_tokens == out.stats.tokens
    assert done.usage.model_extra["forwards"] == out.stats.row_forwards[0]
    assert done.usage.model_extra["tokens_per_forward"] == pytest.approx(out.stats.tokens_per_forward, abs=1e-3)
    assert done.usage.prompt_tokens + done.usage.completion_tokens == done.usage.total_tokens


def test_a_stream_joins_to_the_answer_and_ends_with_its_cost(client: Any, model: fastdllm.Model) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny-llada", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == offline(model, gen_length=64)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 3
    assert chunks[-1].usage.completion_tokens > 0 and not chunks[-1].choices


def test_denoising_events_tell_every_forward(client: Any) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny-llada",
            messages=MESSAGES,
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True, "include_denoising": True},
        )
    )
    events = [chunk.model_extra["denoising"] for chunk in chunks if "denoising" in (chunk.model_extra or {})]
    assert [event["forward"] for event in events] == list(range(1, chunks[-1].usage.model_extra["forwards"] + 1))
    seen: dict[int, str] = {}
    for event in events:
        size = event["stop"] - event["start"]
        assert size == len(event["tokens"]) == len(event["ids"]) == len(event["confidence"])
        for at in event["committed"]:
            assert at not in seen and event["start"] <= at < event["stop"]
            seen[at] = event["tokens"][at - event["start"]]
            assert 0 <= event["confidence"][at - event["start"]] <= 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "".join(seen[at] for at in sorted(seen)).startswith(text)


def test_log_probabilities_are_those_of_the_commit(client: Any, model: fastdllm.Model) -> None:
    ask = {"model": "tiny-llada", "messages": MESSAGES, "logprobs": True, "top_logprobs": 4}
    done = client.chat.completions.create(**ask).choices[0].logprobs.content
    out = fastdllm.generate(model, [MESSAGES], gen_length=64)
    assert [entry.logprob for entry in done] == pytest.approx(out.logprobs[0].tolist()[: len(done)], abs=1e-5)
    assert len(done) == out.stats.tokens
    for entry in done:
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) == 4
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs), "greedy decoding takes the likeliest"
    streamed = [
        entry
        for chunk in client.chat.completions.create(**ask, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in done]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in done], abs=1e-6)


def test_a_stop_string_is_no_part_of_the_answer(client: Any, model: fastdllm.Model) -> None:
    whole = offline(model, gen_length=64)
    for stop in ("pencils", [" have", "zzz"]):
        first = min(whole.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in whole)
        for stream in (False, True):
            done = client.chat.completions.create(model="tiny-llada", messages=MESSAGES, stop=stop, stream=stream)
            text = (
                "".join(chunk.choices[0].delta.content or "" for chunk in done)
                if stream
                else done.choices[0].message.content
            )
            assert text == whole[:first]


def test_completions_take_texts_and_ids_and_repeat_them_on_request(client: Any, model: fastdllm.Model) -> None:
    texts = ["Question: What is 3 + 4?\nAnswer:", "Tom has 5 apples and"]
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = fastdllm.generate(model, texts, gen_length=20).texts
    for prompt in (texts, ids):
        done = client.completions.create(model="tiny-llada", prompt=prompt, max_tokens=20)
        assert [choice.text for choice in done.choices] == expected
        assert [choice.index for choice in done.choices] == [0, 1]
    one = client.completions.create(model="tiny-llada", prompt=texts[0], max_tokens=20, echo=True)
    assert one.choices[0].text == texts[0] + expected[0]
    assert client.completions.create(model="tiny-llada", prompt=ids[0], max_tokens=20).choices[0].text == expected[0]


def test_repeated_prompts_carry_the_log_likelihood_of_every_token(client: Any, model: fastdllm.Model) -> None:
    from fastdllm.likelihood import log_likelihoods
    from fastdllm.prompts import encode

    prompt = encode(model, "Tom has 5 apples and eats 2 of them.")[0]
    listed = (
        client.completions.create(model="tiny-llada", prompt=prompt.tolist(), max_tokens=3, echo=True, logprobs=1)
        .choices[0]
        .logprobs
    )
    assert listed.token_logprobs[0] is None and len(listed.tokens) == len(prompt) + 3
    score = log_likelihoods(model, [(prompt[:4], prompt[4:])], method="chain")[0]
    assert sum(listed.token_logprobs[4 : len(prompt)]) == pytest.approx(score.log_likelihood, abs=1e-4)


def test_completions_list_the_stop_token_too(client: Any, model: fastdllm.Model) -> None:
    """Clients that score a prompt ask for one token and leave it out again, whatever it is."""
    answer = fastdllm.generate(model, MESSAGES, gen_length=64).sequences[0].tolist()
    assert answer[-1] in model.spec.stop_ids
    ended = {"model": "tiny-llada", "prompt": answer[:-1], "max_tokens": 1, "echo": True, "logprobs": 1}
    assert fastdllm.generate(model, [answer[:-1]], gen_length=1).sequences[0].tolist() == answer, "it ends at once"
    listed = client.completions.create(**ended).choices[0].logprobs
    assert len(listed.tokens) == len(answer) and listed.tokens[-1] == model.tokenizer.decode(answer[-1:])
    assert listed.token_logprobs[-1] == max(listed.top_logprobs[-1].values()) <= 0
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**ended, stream=True) if chunk.choices]
    assert [token for chunk in chunks if chunk for token in chunk.tokens] == listed.tokens
    cut = client.completions.create(**(ended | {"prompt": LONG, "max_tokens": 24, "echo": False, "stop": "\n"})).choices[0]
    assert "".join(cut.logprobs.tokens).startswith(cut.text), "a stop string is no token"


def test_a_context_that_comes_again_is_scored_once(model: fastdllm.Model) -> None:
    """Each ending gets the likelihood that it gets alone, whatever was asked before."""
    from fastdllm.likelihood import log_likelihoods
    from fastdllm.prompts import encode
    from fastdllm.serving.readings import PromptReadings

    [context, *endings] = encode(model, ["Tom has 5 apples and eats 2 of them. Left:", " 3", " 4", " 7"])
    readings, work = PromptReadings(model), []

    async def call(read: Any) -> Any:
        work.append(read)
        return read()

    forwards = []
    for ending in [*endings, endings[1], endings[0][:0]]:
        prompt = torch.cat([context, ending])
        found, count = asyncio.run(readings.of(prompt, call))
        forwards.append(count)
        score = log_likelihoods(model, [(prompt[:1], prompt[1:])], method="chain")[0]
        assert float(sum(reading.log_prob for reading in found)) == pytest.approx(score.log_likelihood, abs=1e-4)
    new = len(endings[0])
    assert all(len(ending) == new for ending in endings) and 0 < new < len(context)
    # The last prompt is shorter, so a bidirectional model sees fewer masks after each token.
    assert forwards[0] == len(context) + new - 1 and max(forwards[1:3]) <= new and forwards[3:] == [0, len(context) - 1]
    assert len(work) <= sum(-(-count // 16) for count in forwards)


def test_n_answers_draw_from_seeds_of_their_own(client: Any, model: fastdllm.Model) -> None:
    done = client.completions.create(model="tiny-llada", prompt=LONG, max_tokens=16, n=3, seed=7, temperature=3.0)
    expected = [fastdllm.generate(model, LONG, gen_length=16, seed=7 + k, temperature=3.0).texts[0] for k in range(3)]
    assert [choice.text for choice in done.choices] == expected and len(set(expected)) > 1


def test_numbers_of_decoding_come_with_the_request(client: Any, model: fastdllm.Model) -> None:
    forwards = {}
    for threshold in (0.5, 0.9999):
        done = client.chat.completions.create(model="tiny-llada", messages=MESSAGES, extra_body={"threshold": threshold})
        assert done.choices[0].message.content == offline(model, gen_length=64, threshold=threshold)
        forwards[threshold] = done.usage.model_extra["forwards"]
    assert forwards[0.5] < forwards[0.9999]
    # An option of the server may be repeated at the value that it has.
    client.chat.completions.create(model="tiny-llada", messages=MESSAGES, max_tokens=4, extra_body={"cache": "dual"})


def test_constraints_stand_where_they_were_asked_for(client: Any, model: fastdllm.Model) -> None:
    words = model.tokenizer(" apples", add_special_tokens=False)["input_ids"]
    done = client.completions.create(
        model="tiny-llada",
        prompt=LONG,
        max_tokens=24,
        extra_body={"constraints": {"20": " apples"}},
        logprobs=0,
    )
    expected = fastdllm.generate(model, LONG, gen_length=24, constraints={20 + i: token for i, token in enumerate(words)})
    assert done.choices[0].text == expected.texts[0]
    assert done.choices[0].logprobs.token_logprobs[20] is None


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-llada"]
    assert client.models.retrieve("tiny-llada").model_extra["max_model_len"] == 512


REFUSED = [
    ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": MESSAGES, "best_of": 2}, "best_of"),
    ({"messages": MESSAGES, "cache": "none"}, "cache"),
    ({"messages": MESSAGES, "block_length": 8}, "block_length"),
    ({"messages": MESSAGES, "decoder": "factor"}, "decoder"),
    ({"messages": MESSAGES, "thresold": 0.5}, "thresold"),
    ({"messages": MESSAGES, "factor": 1.0}, "factor"),
    ({"messages": MESSAGES, "temperature": -1}, "temperature"),
    ({"messages": MESSAGES, "temperature": "hot"}, "temperature"),
    ({"messages": MESSAGES, "temperature": 1e308}, "temperature"),  # infinite in fp32, and a division by it gives no scores
    ({"messages": MESSAGES, "temperature": 1e-30}, "temperature"),
    ({"messages": MESSAGES, "threshold": 7}, "threshold"),
    ({"messages": MESSAGES, "threshold": "0.9"}, "threshold"),
    ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
    ({"messages": MESSAGES, "max_tokens": 100_000}, "max_tokens"),
    ({"messages": MESSAGES, "max_tokens": True}, "max_tokens"),
    ({"messages": MESSAGES, "n": 0}, "n"),
    ({"messages": MESSAGES, "seed": 2**70}, "seed"),
    ({"messages": MESSAGES, "stop": ""}, "stop"),
    ({"messages": MESSAGES, "stop": [1]}, "stop[0]"),
    ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
    ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 50}, "top_logprobs"),
    ({"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
    (
        {"messages": MESSAGES, "stream": True, "stream_options": {"include_everything": True}},
        "stream_options.include_everything",
    ),
    ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": MESSAGES, "constraints": {"900": "x"}}, "constraints"),
    ({"messages": MESSAGES, "constraints": {"1": 99_999_999}}, "constraints"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": []}, "messages"),
    ({}, "messages"),
]


@pytest.mark.parametrize(("body", "field"), REFUSED, ids=[f"{i}-{field}" for i, (_, field) in enumerate(REFUSED)])
def test_what_cannot_be_honoured_is_refused_by_name(server: str, body: dict[str, Any], field: str) -> None:
    status, answer, _ = post(server, "/v1/chat/completions", body)
    assert status == 400, answer
    assert answer["error"]["param"] == field and field in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_values_that_change_nothing_are_accepted(server: str) -> None:
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
        "user": "somebody",
        "stop": None,
        "temperature": None,
    }
    status, answer, _ = post(server, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, **neutral})
    assert status == 200, answer


def test_what_is_too_long_is_told_apart(server: str) -> None:
    status, answer, _ = post(server, "/v1/completions", {"prompt": "word " * 600})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    status, answer, _ = post(server, "/v1/completions", {"prompt": "x" * 3_000_000})
    assert status == 413 and answer["error"]["code"] == "context_length_exceeded"
    status, answer, _ = post(server, "/v1/completions", b'{"prompt": "' + b"x" * 10_000_000 + b'"}')
    assert status == 413 and answer["error"]["code"] == "body_too_large"


def test_errors_of_http_have_the_same_format(server: str, client: Any) -> None:
    assert post(server, "/v1/nothing", {})[:2][0] == 404
    assert "error" in post(server, "/v1/nothing", {})[1]
    assert post(server, "/v1/models", {})[0] == 405
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.body["code"] == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny-llada", messages=MESSAGES, temperature=-3)
    assert bad.value.body["param"] == "temperature"
    status, answer, _ = post(server, "/v1/chat/completions", {"messages": MESSAGES}, **{"Content-Type": "text/plain"})
    assert status == 400 and "Content-Type" in answer["error"]["message"]


def test_another_name_for_this_machine_is_refused(server: str) -> None:
    status, answer, _ = post(server, "/v1/chat/completions", {"messages": MESSAGES}, Host="evil.example")
    assert status == 403 and answer["error"]["code"] == "unknown_host"


def test_decisions_carry_probabilities(server: str, model: fastdllm.Model) -> None:
    questions = [{"name": "even", "type": "yes_no"}, {"name": "rest", "type": "score", "options": [1, 2, 3]}]
    status, answer, _ = post(server, "/v1/decide", {"messages": MESSAGES, "questions": questions})
    assert status == 200, answer
    expected = fastdllm.decide(model, [MESSAGES], questions)
    for name, got in answer["answers"].items():
        assert got["answer"] == expected[name].answer
        assert got["probabilities"] == pytest.approx({str(k): v for k, v in expected[name].probabilities.items()})
    assert answer["answers"]["rest"]["mean"] == pytest.approx(expected["rest"].mean)
    for broken in ([], [{"name": "x", "type": "maybe"}], [{"name": "x", "type": "choice"}], [questions[0]] * 2):
        status, answer, _ = post(server, "/v1/decide", {"messages": MESSAGES, "questions": broken})
        assert status == 400 and answer["error"]["param"].startswith("questions")
    status, answer, _ = post(server, "/v1/decide", {"questions": questions})
    assert status == 400 and answer["error"]["param"] == "messages"


def until(condition: Any, what: str) -> None:
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_a_client_that_hangs_up_frees_its_row(server: str, client: Any) -> None:
    slow = {"prompt": LONG, "max_tokens": 450, "threshold": 1.0, "constraints": {"449": 44}}
    before = metric(server, "fastdllm_aborted")
    extra = {name: slow[name] for name in ("threshold", "constraints")}
    stream = client.completions.create(model="tiny-llada", prompt=LONG, max_tokens=450, stream=True, extra_body=extra)
    assert next(chunk for chunk in stream if chunk.choices[0].text)
    stream.close()
    until(lambda: metric(server, "fastdllm_aborted") == before + 1, "the stream is decoded further")
    body = json.dumps(slow).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: metric(server, "fastdllm_running"), "the request never ran")
    until(lambda: metric(server, "fastdllm_aborted") == before + 2, "the request is decoded further")
    settled(server)


def test_metrics_count_what_happened(server: str, client: Any) -> None:
    tokens, answers = metric(server, "fastdllm_generated_tokens_total"), metric(server, "fastdllm_request_seconds_count")
    done = client.completions.create(model="tiny-llada", prompt="Tom has", max_tokens=8)
    assert metric(server, "fastdllm_generated_tokens_total") == tokens + done.usage.completion_tokens
    assert metric(server, "fastdllm_request_seconds_count") == answers + 1
    assert metric(server, "fastdllm_requests_total") > 0


def test_keys_queues_deadlines_and_an_orderly_end() -> None:
    with running("tiny-llada", "--api-key", "s3cret", "--max-batch", "1", "--max-queue", "1", "--set", "threshold=1.0") as (
        url,
        process,
    ):
        long = {"prompt": "Tom has", "max_tokens": 300, "constraints": {"299": 44}}
        key = {"Authorization": "Bearer s3cret"}
        for wrong in ({}, {"Authorization": "Bearer guess"}, {"Authorization": "s3cret"}):
            status, answer, _ = post(url, "/v1/completions", long, **wrong)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        status, answer, _ = post(url, "/v1/completions", {**long, "timeout": 0.2}, **key)
        assert status == 504 and answer["error"]["code"] == "deadline_exceeded"

        answers: list[tuple[int, Any, Any]] = []
        threads = [threading.Thread(target=lambda: answers.append(post(url, "/v1/completions", long, **key))) for _ in "ab"]
        for i, thread in enumerate(threads):
            thread.start()
            end = time.monotonic() + 600
            while metric(url, "fastdllm_running") + metric(url, "fastdllm_waiting") <= i and time.monotonic() < end:
                time.sleep(0.01)
        status, answer, headers = post(url, "/v1/completions", long, **key)
        assert status == 429 and int(headers["Retry-After"]) >= 1 and answer["error"]["code"] == "queue_full"

        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(600)
        assert [status for status, _, _ in answers] == [200, 200], "what was taken in is answered before the end"
        assert process.wait(600) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-model"],
        ["tiny-llada", "--cache", "best"],
        ["tiny-llada", "--set", "threshold"],
        ["no-such-model", "--host", "192.0.2.1"],  # the address is looked at first
        ["tiny-llada", "--host", "nowhere.invalid"],
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    from fastdllm.serving.command import main

    assert main([*arguments, "--port", str(free_port())], prog="fastdllm serve") == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("fastdllm serve: ") and "\n" not in err
    assert ("is no address of this machine" in err) == ("--host" in arguments)
