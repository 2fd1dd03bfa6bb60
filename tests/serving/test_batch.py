# SPDX-License-Identifier: Apache-2.0
"""Batch files: OpenAI's format, and no line lost or doubled however often a run is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastdllm
from fastdllm.serving import batch
from fastdllm.serving.batch import Line, Output, main, read_lines, share
from tests.serving.conftest import ROOT


def line(i: int, **body: Any) -> dict[str, Any]:
    body = {"prompt": f"Tom has {i} apples and", "max_tokens": 16, **body}
    return {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")
    return path


def results(path: Path) -> dict[str, Any]:
    entries = [json.loads(entry) for entry in path.read_text(encoding="utf-8").splitlines()]
    assert len({entry["custom_id"] for entry in entries}) == len(entries), "a line is doubled"
    return {entry["custom_id"]: entry for entry in entries}


def test_every_line_gets_the_answer_it_gets_alone_or_its_error(tmp_path: Path, model: fastdllm.Model) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    lines = [
        *(line(i, max_tokens=8 + i) for i in range(5)),
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "decide", "method": "POST", "url": "/v1/decide",
         "body": {"prompt": "x", "questions": [{"name": "ok", "type": "yes_no"}]}},
        line(90, temperature=-1),
        line(91, stream=True),
        {"custom_id": "nothing", "method": "POST", "url": "/v1/completions", "body": None},
    ]  # fmt: skip
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main([str(source), str(out), "--max-batch", "4"]) == 1
    found = results(out)
    assert set(found) == {entry["custom_id"] for entry in lines}
    for i in range(5):
        body = found[f"request-{i}"]["response"]["body"]
        expected = fastdllm.generate(model, f"Tom has {i} apples and", gen_length=8 + i).texts[0]
        assert body["choices"][0]["text"] == expected and found[f"request-{i}"]["error"] is None
    assert found["chat"]["response"]["status_code"] == found["decide"]["response"]["status_code"] == 200
    for name in ("request-90", "request-91", "nothing"):
        assert found[name]["response"]["status_code"] == 400 and found[name]["error"]["message"]
    before = out.read_bytes()
    assert main([str(source), str(out)]) == 1, "everything has a line already, some of them errors"
    assert out.read_bytes() == before


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A service that answers at once; its state is "ready" until it is set."""
    service = SimpleNamespace(health="ready", close=lambda timeout: None)
    service.start = lambda: service

    async def endpoint(service: Any, body: Any) -> dict[str, Any]:
        if body == "lose the device":
            service.health = "failed"
        if service.health == "failed" or body == "fail":
            raise RuntimeError("CUDA error")
        return {"body": body}

    monkeypatch.setitem(batch.ENDPOINTS, "/v1/completions", endpoint)
    monkeypatch.setattr(batch, "_service", lambda *_: service)
    return service


def ask(name: str, body: Any) -> dict[str, Any]:
    return {"custom_id": name, "url": "/v1/completions", "body": body}


def test_what_has_no_answer_when_the_device_fails_is_asked_again(
    tmp_path: Path, silent: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    """Each such line had got an error for good, and the next run had nothing left to do."""
    lines = [ask("a", "1234567"), ask("b", "lose the device"), *(ask(str(i), i) for i in range(100))]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [str(source), str(out), "--max-batch", "1"]
    assert main(command, prog="fastdllm batch") == 1
    assert "the same command asks again" in capsys.readouterr().err
    assert 0 < len(before := results(out)) + 1 < len(lines) and not [one for one in before.values() if one["error"]]
    silent.health = "ready"
    batch.ENDPOINTS["/v1/completions"] = answer_anything
    assert main(command) == 0
    assert set(results(out)) == {entry["custom_id"] for entry in lines}


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "0"), ("0", "1e3"), ("0", "-1")])
def test_a_process_that_none_of_the_lines_are_for_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, rank: str, size: str
) -> None:
    """It ended with success, and nothing was done."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    source = write(tmp_path / "in.jsonl", [ask("a", 1)])
    assert main([str(source), str(tmp_path / "out.jsonl")], prog="fastdllm batch") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "RANK" in error


@pytest.mark.parametrize("text", ["", "\n\n", "\r\n", "  \n"])
def test_a_file_without_a_request_says_so(tmp_path: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    (tmp_path / "in.jsonl").write_text(text, newline="")
    assert main([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]) == 0
    assert "in.jsonl holds no request" in capsys.readouterr().err


async def answer_anything(service: Any, body: Any) -> dict[str, Any]:
    return {"body": body}


@pytest.mark.usefixtures("silent")
def test_errors_of_an_earlier_session_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = write(tmp_path / "in.jsonl", [ask("a", 1), ask("b", "fail")]), tmp_path / "out.jsonl"
    for _ in range(3):
        assert main([str(source), str(out)]) == 1
        assert "1 requests got an error" in capsys.readouterr().err
    write(source, [ask("a", 1)])
    assert main([str(source), str(out)]) == 0, "a line that nobody asks for any more"


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("change", ["body", "url", "model", "dtype", "option"])
def test_an_answer_to_another_request_is_not_taken_for_this_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(batch.ENDPOINTS, "/v1/decide", answer_anything)
    source, out = write(tmp_path / "in.jsonl", [ask("a", 1), ask("b", 2)]), tmp_path / "out.jsonl"
    assert main([str(source), str(out)]) == 0
    kept = out.read_bytes()
    changed = {**ask("a", 7 if change == "body" else 1), **({"url": "/v1/decide"} if change == "url" else {})}
    write(source, [changed, ask("b", 2)])
    options = {"model": ["--model", "tiny-dream"], "dtype": ["--dtype", "bfloat16"], "option": ["--gen-length", "32"]}
    assert main([str(source), str(out), *options.get(change, [])]) == 2
    assert "answers 'a' for another body, model or options" in capsys.readouterr().err
    assert out.read_bytes() == kept


def answered(name: str) -> dict[str, Any]:
    """A line of output."""
    return {"id": f"batch_req_{name}", "custom_id": name, "response": {"status_code": 200}, "error": None}


def test_a_torn_line_is_cut_off_and_asked_again(tmp_path: Path) -> None:
    output = Output(tmp_path / "out.jsonl")
    for i in range(3):
        output.add(answered(f"request-{i}"))
    whole = output.path.read_bytes()
    for cut in (1, 5, len(whole) // 3 - 1, len(whole) // 3):
        output.path.write_bytes(whole[:-cut])
        done = output.done()
        assert done.keys() == {f"request-{i}" for i in range(whole[:-cut].count(b"\n"))}
        output.add(answered("next"))
        assert output.done().keys() == done.keys() | {"next"}
    output.path.write_bytes(whole[: len(whole) // 3 - 9])
    assert output.done() == {} and output.path.read_bytes() == b""


@pytest.mark.parametrize(
    "text", ["my notes\n", "my notes", "1\nmy notes", '{"custom_id": "half', "[" * 100_000, "\ufffd", "{}\n", "3"]
)
@pytest.mark.parametrize("before", [[], [answered("a")]])
def test_a_file_that_is_no_output_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str, before: list[dict[str, Any]]
) -> None:
    """Also one whose last line has no end, which is cut off of an output."""
    source = write(tmp_path / "in.jsonl", [line(0)])
    other = tmp_path / "notes.txt"
    other.write_text("".join(json.dumps(one) + "\n" for one in before) + text)
    kept = other.read_bytes()
    assert main([str(source), str(other)], prog="fastdllm batch") == 2
    assert other.read_bytes() == kept
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["input", "another input", "folder", "pipe", "device", "missing folder"])
def test_an_output_that_cannot_be_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str) -> None:
    """The lines of an input have a custom_id as well: taken for answers, they would end the run with success."""
    source = write(tmp_path / "in.jsonl", [line(0)])
    other = source if kind == "input" else Path("/dev/full") if kind == "device" else tmp_path / "other"
    if kind == "another input":
        write(other, [line(0), line(1)])
    elif kind == "folder":
        other.mkdir()
    elif kind == "missing folder":
        other = tmp_path / "nowhere" / "out.jsonl"
    elif kind == "pipe":
        os.mkfifo(other)
    kept = source.read_bytes()
    assert main([str(source), str(other)], prog="fastdllm batch") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(other) in err, err
    assert source.read_bytes() == kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "in.jsonl:1 is not JSON"),
        ("[]", "in.jsonl:1 must be an object"),
        ("[" * 100_000, "in.jsonl:1 is not JSON"),
        ('{"custom_id": "\\ud800", "url": "/v1/completions"}', "in.jsonl:1: custom_id has a lone surrogate"),
        ('{"custom_id": 3, "url": "/v1/completions"}', "in.jsonl:1 must be an object"),
        ('{"custom_id": "a", "url": "/v1/files"}', "allowed are POST and"),
        (
            '{"custom_id": "a", "url": "/v1/completions"}\n\n{"custom_id": "a", "url": "/v1/completions"}',
            "in.jsonl:3: custom_id 'a'",
        ),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        read_lines(tmp_path / "in.jsonl")


def test_processes_share_all_lines_longest_first() -> None:
    lines = [
        Line(i, str(i), "/v1/completions", {"prompt": "x" * (i * 7 % 13), "max_tokens": 1 + i % 5}, i * 7 % 13)
        for i in range(23)
    ]
    parts = [share(lines, rank, 3) for rank in range(3)]
    assert sorted(entry.number for part in parts for entry in part) == list(range(23))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    long = Line(99, "99", "/v1/completions", {"prompt": "x" * 500}, 500)
    assert share([*lines, long], 0, 1)[0] is long


def test_a_body_nested_as_deep_as_can_be_read_is_a_request(tmp_path: Path) -> None:
    """Its length was taken by writing it again, which cannot be done as deep."""
    for depth in range(800, 1010):
        body = '{"x": ' * depth + "1" + "}" * depth
        (tmp_path / "in.jsonl").write_text(f'{{"custom_id": "1", "url": "/v1/completions", "body": {body}}}\n')
        try:
            lines = read_lines(tmp_path / "in.jsonl")
        except ValueError:
            break
        assert share(lines, 0, 1) == lines


def start(arguments: list[str], *launcher: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*(launcher or (sys.executable,)), "-m", "fastdllm.cli", "batch", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True)


def test_a_killed_run_goes_on_without_a_lost_or_doubled_line(tmp_path: Path, model: fastdllm.Model) -> None:
    lines = [line(i, max_tokens=48, threshold=0.999) for i in range(40)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    arguments = [str(source), str(out), "--max-batch", "4"]
    process, end = start(arguments), time.monotonic() + 90
    while time.monotonic() < end and not (out.exists() and out.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = out.read_bytes()
    assert 5 <= kept.count(b"\n") < 40, "the run was to be killed in its middle"
    with out.open("ab") as file:
        file.write(b'{"id": "batch_req_7", "custom_id": "request-7", "resp')  # what a kill in the middle of a line leaves
    assert main(arguments) == 0
    assert out.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    found = results(out)
    assert set(found) == {entry["custom_id"] for entry in lines}
    expected = fastdllm.generate(model, "Tom has 3 apples and", gen_length=48, threshold=0.999).texts[0]
    assert found["request-3"]["response"]["body"]["choices"][0]["text"] == expected


@pytest.mark.slow
def test_two_processes_answer_one_file(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    lines = [line(i) for i in range(20)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
    process = start([str(source), str(out), "--device", "cpu"], *launcher)
    assert process.wait(110) == 0, process.stderr.read().decode()[-3000:]
    assert set(results(out)) == {entry["custom_id"] for entry in lines}
