# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a server: addresses that are none, and servers that are not this project's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from scripts.benchmarks import serve

httpx = pytest.importorskip("httpx", reason="needs fastdllm[serve]")
ADDRESSES = [
    "",
    " ",
    "127.0.0.1:80",
    "http://",
    "http://:80",
    "ftp://a",
    "file:///etc/hosts",
    "http://[::1",
    "http://a:99999",
]
ADDRESSES += ["http://a:x", "http://a:0", "http://a b", "http://a\n"]


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_that_is_none_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty one, as of a variable that is not set, measured a server of the benchmark's own."""
    with pytest.raises(SystemExit) as stopped:
        serve.parser().parse_args(["--url", url])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "https://example.com", "http://[::1]:80/prefix"])
def test_addresses_are_taken(url: str) -> None:
    assert serve.parser().parse_args(["--url", url]).url == url


def event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


CHOICE = {"choices": [{"text": "a"}]}
ANSWERS = {
    "a page": "<html></html>",
    "nothing": "",
    "no usage": event(**CHOICE),
    "no forwards": event(**CHOICE, usage={"completion_tokens": 3}),
    "no choices": event(object="chunk"),
    "choices without text": event(choices=[{"delta": {}}]),
    "choices that are none": event(choices=5),
    "usage that is none": event(**CHOICE, usage=[1]),
    "an error without a message": event(error="no"),
    "torn": 'data: {"choices": [',
}


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("status", [200, 404])
def test_another_server_is_named(answer: str, status: int) -> None:
    async def ask() -> dict[str, float]:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=ANSWERS[answer]))
        async with httpx.AsyncClient(transport=transport, base_url="http://elsewhere:1") as client:
            return await serve.stream(client, {})

    with pytest.raises(ValueError, match=r"http://elsewhere:1.* answers (otherwise|with status 404)"):
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int8"], "--quantize is of a --shape"),
        (["--url", "http://127.0.0.1:1", "--device", "cpu"], "--device is of a server in this process"),
        (["--url", "http://127.0.0.1:1", "--set", "cache=dual"], "--set is of a server in this process"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        serve.main(arguments)
    assert message in capsys.readouterr().err
