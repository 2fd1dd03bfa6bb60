# SPDX-License-Identifier: Apache-2.0
"""The command that serves the page: its options, its address and its models."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_the_command_checks_its_options_and_its_address(capsys: pytest.CaptureFixture) -> None:
    from fastdllm.ui import app

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert app.main(["--port", str(port)]) == 2
        assert f"port {port} of 127.0.0.1 is taken" in capsys.readouterr().err
        assert app.free_port("127.0.0.1", app.PORTS) in app.PORTS
    for host in ("192.0.2.1", "999.1.1.1", "nowhere.invalid", "2001:db8::1"):  # reserved: no machine's own
        assert app.main(["--host", host]) == 2
        message = capsys.readouterr().err
        assert f"--host {host} is no address of this machine" in message and "--port" not in message
    for options, expected in (
        (["--preset", "quickest"], "quickest"),
        (["--threshold", "2"], "threshold=2.0 must lie in"),
        (["--max-batch", "0"], "--max-batch: must be an integer from 1"),
        (["--quantize", "nothing"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            app.main(options)
        assert stopped.value.code == 2 and expected in capsys.readouterr().err
    assert app.main(["--model", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_address_is_told_when_it_can_be_reached() -> None:
    from fastdllm.ui import app

    port = app.free_port("127.0.0.1", app.PORTS)
    command = [sys.executable, "-m", "fastdllm.cli", "app", "--model", "tiny-sudoku", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2])
    try:
        assert process.stdout is not None
        said = next(line for line in process.stdout if "http://" in line)
        assert f"http://127.0.0.1:{port} " in said
        socket.create_connection(("127.0.0.1", port), timeout=600).close()
    finally:
        process.terminate()
        process.communicate()


def test_the_command_serves_its_models_to_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdllm.serving import command
    from fastdllm.ui import app

    ran: list[tuple[Any, str]] = []
    monkeypatch.setattr(command, "run", lambda served, host, *_: ran.append((served, host)) or 0)
    assert app.main(["--model", "tiny-sudoku", "--model", "tiny-llada", "--threshold", "0.8", "--cache", "prefix"]) == 0
    served, host = ran[0]
    services = served.state.page.services
    assert host == "127.0.0.1" and list(services) == ["tiny-sudoku", "tiny-llada"]
    assert all(service.config.threshold == 0.8 and service.config.cache == "prefix" for service in services.values())
    assert served.state.service is services["tiny-sudoku"]
    gate = next(layer for layer in served.user_middleware if layer.cls.__name__ == "Gate")
    assert gate.kwargs["hosts"] == ("127.0.0.1", "localhost", "[::1]")
    assert app.main([], default_model="tiny-dream") == 0
    assert next(iter(ran[1][0].state.page.services)) == "tiny-dream" and len(ran[1][0].state.page.services) == 4
