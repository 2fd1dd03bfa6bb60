# SPDX-License-Identifier: Apache-2.0
"""Where a server listens and to whom: what is said of it in vain, and what opens it further than it says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastdllm.serving import command
from fastdllm.serving.address import OWN_NAMES, host_name, is_loopback
from fastdllm.serving.app import create_app

LOOPBACK = ["127.0.0.1", "127.0.0.2", "127.1", "0x7f.1", "2130706433", "localhost", "LOCALHOST", "::1", "::ffff:127.0.0.1"]
REACHED = ["0.0.0.0", "::", "0", "192.0.2.1", "2001:db8::1", "nowhere.invalid", "a..b", "x" * 300, ""]


def limits(*arguments: str) -> dict[str, Any]:
    return command.limits(command.parser("serve").parse_args(list(arguments)))


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_server_of_this_machine_only_names_itself_however_its_address_is_written(host: str) -> None:
    hosts = limits("--host", host)["hosts"]
    assert {*OWN_NAMES, host_name(host)} == set(hosts), "any other name is one that a web page pointed here"


@pytest.mark.parametrize("host", REACHED)
def test_other_interfaces_are_not_taken_for_it(host: str) -> None:
    assert not is_loopback(host)
    if host:
        assert limits("--host", host)["hosts"] is None


@pytest.mark.parametrize("host", ["", " ", "\t"])
def test_an_empty_address_is_a_mistake(host: str) -> None:
    """As of a variable of the shell that is not set; sockets take it for all interfaces."""
    with pytest.raises(ValueError, match="--host is empty"):
        limits("--host", host)


@pytest.mark.parametrize("key", ["", " ", "two words", "clé", "line\nbreak", " padded"])
def test_a_key_that_no_request_can_have_or_every_one_has(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDLLM_API_KEY", key)
    for attempt in (lambda: limits("--api-key", key), limits, lambda: create_app(SimpleNamespace(), api_key=key)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="the API key must be"):
            attempt()


@pytest.mark.parametrize("name", ["", "a b", "*", "example.com:80", "http://example.com", "exämple.com", "u@h", "::g"])
def test_a_name_that_no_host_header_has(name: str) -> None:
    for attempt in (lambda: limits("--allowed-host", name), lambda: create_app(SimpleNamespace(), hosts=[name])):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="the name of a host must be"):
            attempt()


@pytest.mark.parametrize(
    "given, heard",
    [("Example.COM", "example.com"), ("::1", "[::1]"), ("[0:0:0:0:0:0:0:1]", "[::1]"), ("10.0.0.7", "10.0.0.7")],
)
def test_a_name_is_compared_as_headers_have_it(given: str, heard: str) -> None:
    assert limits("--allowed-host", given)["hosts"] == (heard,)


@pytest.mark.parametrize(
    "option", ["--max-batch", "--max-positions", "--max-queue", "--timeout", "--port", "--replicas", "--min-replicas"]
)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e300", "99999999999999", "", "x"])
def test_a_limit_that_is_none_is_one_line(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Too large a batch, for one, was tables of terabytes, and the server said that its device had failed."""
    with pytest.raises(SystemExit) as stopped:
        limits(option, value)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
