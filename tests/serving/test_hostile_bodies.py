# SPDX-License-Identifier: Apache-2.0
"""Whatever a body holds, the answer is an answer or an error of the sender's, and the server lives on."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdllm
from fastdllm import DecodeConfig
from fastdllm.serving import service as service_module
from fastdllm.serving.app import EventStream, create_app
from fastdllm.serving.protocol import ApiError, CompletionBody
from fastdllm.serving.protocol import numbers as own_numbers
from fastdllm.serving.service import Service
from tests.examples import examples

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/decide", "/page/chat", "/page/words")
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/decide": {"prompt": "Hi", "questions": [{"name": "ok", "type": "yes_no"}]},
    "/page/chat": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/page/words": {"model": "tiny-llada", "words": "1:Hi", "length": 8},
}
FIELDS = [
    "model", "messages", "prompt", "questions", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "n",
    "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "constraints", "threshold", "alg_temp",
    "timeout", "cache", "tools", "user", "logit_bias", "cfg_scale", "gen_length", "setting", "words",
    "side", "length", "\ud800", "a\x00b", "",
]  # fmt: skip

texts = st.text(st.characters(), max_size=8) | st.sampled_from(["\ud800", "\x00", "<|mask|>", "🙂", "NaN"])
numbers = (
    st.integers()
    | st.integers(-3, 600)
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from([10**400, -(10**400), 1e308])
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


class Client:
    """The application in this process, on an event loop that lasts."""

    def __init__(self, service: Service) -> None:
        self.service, self.loop = service, asyncio.new_event_loop()
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=600)

    def post(self, path: str, body: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self.loop.run_until_complete(self.http.post(path, content=body, headers=headers))


@pytest.fixture(scope="module")
def client(model: fastdllm.Model) -> Iterator[Client]:
    service = Service(model, DecodeConfig(gen_length=4, block_length=4), max_queue=512).start()
    yield Client(service)
    service.close(timeout=30)


def check(client: Client, path: str, body: bytes) -> None:
    response = client.post(path, body)
    assert response.status_code in (200, 400, 404, 413), (response.status_code, response.text, body[:300])
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"] and error["type"]
    assert client.service.health != "failed"


LIMITS = settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LIMITS
@given(st.sampled_from(PATHS), st.sampled_from(FIELDS), values)
def test_a_good_body_with_one_wild_field(client: Client, path: str, field: str, value: Any) -> None:
    check(client, path, json.dumps({**GOOD[path], field: value}).encode("utf-8", "surrogatepass"))


@LIMITS
@given(st.sampled_from(PATHS), values)
def test_any_json_at_every_entry(client: Client, path: str, value: Any) -> None:
    check(client, path, json.dumps(value).encode())


@LIMITS
@given(st.sampled_from(PATHS), st.binary(max_size=60), st.integers(0, 200))
def test_damaged_bodies(client: Client, path: str, noise: bytes, at: int) -> None:
    good = json.dumps(GOOD[path]).encode()
    check(client, path, good[:at] + noise + good[at + len(noise) :])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 5_000,
        b"\x00",
        b"\xff\xfe{}",
        b'{"max_tokens":' + b"9" * 5_000 + b"}",
        b"NaN",
        b'"x"',
    ],
    ids=range(9),
)
def test_bodies_that_break_parsers(client: Client, path: str, body: bytes) -> None:
    response = client.post(path, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_more_answers_than_the_server_ever_takes_are_refused_for_good(client: Client) -> None:
    """ "Try again" would never help: 400, not 429."""
    response = client.post("/v1/completions", json.dumps({"prompt": ["a"] * 1000, "max_tokens": 1}).encode())
    assert response.status_code == 400, response.text
    assert "1000 answers at once are more than this server ever takes" in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [{"prompt": [[1]] * 500, "n": 128}, {"prompt": "a", "n": 128, "max_queue": 10}])
def test_more_answers_than_are_ever_taken_are_refused_before_any_is_made(
    client: Client, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    """A body of 1 KB may ask for a hundred thousand."""
    monkeypatch.setattr(client.service.scheduler, "max_queue", body.pop("max_queue", 512))
    monkeypatch.setattr(client.service, "_encode", None)
    response = client.post("/v1/completions", json.dumps(body | {"max_tokens": 1}).encode())
    assert response.status_code == 400 and "more than this server ever takes" in response.json()["error"]["message"]


def test_every_answer_of_a_request_has_a_seed_of_its_own(client: Client) -> None:
    body = CompletionBody(prompt=["Hi", "Hi", "Ho"], n=2, max_tokens=2, seed=2**63 - 2)
    asked = client.loop.run_until_complete(client.service.completions(body))
    assert [choice.request.seed for choice in asked.choices] == [2**63 - 2, 2**63 - 1, 0, 1, 2, 3]


@pytest.mark.parametrize(("options", "same"), [({}, False), ({"seed": 0}, True)], ids=["no seed", "a seed of the server"])
def test_requests_without_a_seed_draw_anew(model: fastdllm.Model, options: dict[str, Any], same: bool) -> None:
    service = Service(model, DecodeConfig(gen_length=16, **options)).start()
    client = Client(service)
    body = {"prompt": "Hi", "temperature": 30.0, "max_tokens": 16}
    texts = {client.post("/v1/completions", json.dumps(body).encode()).json()["choices"][0]["text"] for _ in range(2)}
    assert len(texts) == 2 - same
    texts = {
        client.post("/v1/completions", json.dumps(body | {"seed": 5}).encode()).text.split("choices")[1] for _ in range(2)
    }
    assert len(texts) == 1
    service.close(timeout=30)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("preset", "preset is fixed when the server starts; here it is 'fast'"),
        ("steps", "steps is fixed when the server starts; here it is not given"),
        ("depth", "depth is fixed when the server starts; here it is not given"),
        ("min_p", "unknown field 'min_p'"),
        ("max_completion_token", "did you mean 'max_completion_tokens'?"),
    ],
)
def test_what_is_told_of_a_field_that_a_request_cannot_set(field: str, told: str) -> None:
    with pytest.raises(ApiError, match=re.escape(told)) as error:
        own_numbers({field: 3}, ("threshold",), {"preset": "fast"})
    assert error.value.param == field
    assert own_numbers({"preset": "fast"}, (), {"preset": "fast"}) == {}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"prompt": "\xe9"}', "it is no UTF-8"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "it holds a number too long"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(client: Client, body: bytes, why: str) -> None:
    response = client.post("/v1/completions", body)
    assert response.status_code == 400 and response.json()["error"]["message"].endswith(why), response.text


@pytest.mark.parametrize("prompts", [["Hi"], ["Hi"] * 20])
def test_constraints_are_measured_before_they_are_spelt_and_spelt_once(
    client: Client, monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    spelt: list[str] = []

    def spell(model: fastdllm.Model, text: str) -> list[int]:
        spelt.append(threading.current_thread().name)
        return [44]

    monkeypatch.setattr(service_module, "encode_literally", spell)
    given = {"prompt": prompts, "max_tokens": 4, "constraints": {"0": "a" * 1_000_000}}
    response = client.post("/v1/completions", json.dumps(given).encode())
    assert response.status_code == 413 and "characters in constraints" in response.text and not spelt
    given["constraints"] = {"0": " a", "2": 45}
    response = client.post("/v1/completions", json.dumps(given).encode())
    assert response.status_code == 200, response.text
    assert len(spelt) == 1 and spelt[0].startswith("tokenizing")


def test_a_long_stop_text_is_one(client: Client) -> None:
    for stop, status in (("x" * 65, 200), (["x" * 65] * 64, 200), (["x"] * 65, 400)):
        response = client.post("/v1/completions", json.dumps(GOOD["/v1/completions"] | {"stop": stop}).encode())
        assert response.status_code == status
    assert response.json()["error"]["message"] == "stop: 65 stop strings are more than 64"


def test_a_body_too_long_is_told_so_whether_its_length_is_or_not(client: Client) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for _ in range(10):
            yield b" " * 2**20

    for content in (b" " * 10 * 2**20, chunks()):
        asked = client.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        response = client.loop.run_until_complete(asked)
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_decoding_loop_is_not_the_senders(
    client: Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("an inner fault")

    monkeypatch.setattr(client.service.scheduler, "_take_in", fails)
    response = client.post("/v1/completions", json.dumps(GOOD["/v1/completions"] | {"stream": stream}).encode())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error" and "an inner fault" not in response.text


def test_a_request_with_two_hosts_is_refused(client: Client) -> None:
    """Servers and proxies differ in which one counts."""
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    response = client.loop.run_until_complete(client.http.get("/health", headers=headers))
    assert response.status_code == 400, response.text


def test_answers_go_on_and_nothing_is_left(client: Client) -> None:
    for path in PATHS:
        assert client.post(path, json.dumps(GOOD[path]).encode()).status_code == 200
    scheduler = client.service.scheduler
    assert not scheduler._active and not scheduler._waiting and scheduler.alive


@pytest.mark.parametrize("told", [0, 1, 2])
def test_a_stream_is_closed_wherever_its_client_hangs_up(told: int) -> None:
    """Before its first event too, when nobody has begun to read the chunks: closing them withdraws the request."""
    ends: list[str] = []

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        try:
            while True:
                yield {}
        finally:
            ends.append("closed")

    async def hang_up() -> None:
        source, sent, gone = chunks(), 0, asyncio.Event()

        async def receive() -> dict[str, Any]:
            if told:
                await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal sent
            sent += message["type"] == "http.response.body"
            if sent >= told:
                gone.set()
                await asyncio.sleep(60)

        await EventStream(await anext(source), source)({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        assert ends == ["closed"]  # while somebody still holds them

    asyncio.run(hang_up())


@pytest.mark.parametrize(
    ("value", "options", "refused"),
    [
        (4, {"suffix": 4}, ""),
        (8, {"suffix": 4}, "suffix is fixed when the server starts; here it is 4"),
        (4, {}, "suffix is not supported by this server"),
        ("", {"suffix": 4}, ""),
        ("Bye", {"suffix": 4}, "suffix is not supported by this server"),
    ],
)
def test_a_suffix_is_openais_text_or_the_number_of_a_cache(value: Any, options: dict[str, Any], refused: str) -> None:
    body = CompletionBody(prompt="Hi", suffix=value)
    if refused:
        with pytest.raises(ApiError, match=refused):
            own_numbers(body.others(), ("threshold",), options)
    else:
        assert own_numbers(body.others(), ("threshold",), options) == {}
