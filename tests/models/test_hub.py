# SPDX-License-Identifier: Apache-2.0
"""The hub path, against a small server that speaks the hub's API for a shipped checkpoint (HF_ENDPOINT).

The cases run in processes of their own: the hub's client reads its settings once, when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import fastdllm
from fastdllm.models.hub import TINY

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[2]
REPO, COMMIT, OTHER = "owner/tiny-sudoku", "a" * 40, "b" * 40
WITHOUT = "owner/without-"  # and the name of a file: REPO, but for that file
LOAD = """
import sys, fastdllm
for name, revision in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        print("loaded", fastdllm.load(name, device="cpu", revision=revision or None).fingerprint())
    except Exception as error:
        print(type(error).__name__, "|", str(error).replace(chr(10), "<newline>"))
"""


class Hub:
    """The files of one repository, the requests that came, and what goes wrong on purpose.

    cut: file -> how many bytes of it are sent before the line is dropped, once.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.requests = files, list[str]()
        self.cut: dict[str, int] = {}
        self.ranges: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, to: BaseHTTPRequestHandler, body: bool) -> None:
        path = to.path.split("?")[0]
        self.requests.append(f"{to.command} {path}")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo != REPO and not repo.startswith(WITHOUT):
            return _send(to, 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        files = {n: content for n, content in self.files.items() if repo != WITHOUT + n}
        if path.startswith("/api") and (not rest or rest[0] == "revision"):
            return self.info(to, repo, files, rest[1] if rest else "main")
        if path.startswith("/api") and rest[0] == "tree":
            listed = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()]
            return _send(to, 200, json.dumps(listed).encode(), body=body)
        return self.file(to, files, rest[1], "/".join(rest[2:]), body)  # .../resolve/REVISION/NAME

    def info(self, to: BaseHTTPRequestHandler, repo: str, files: dict[str, bytes], revision: str) -> None:
        commit = {"main": COMMIT, COMMIT: COMMIT, "v2": OTHER, OTHER: OTHER}.get(revision)
        if commit is None:
            return _send(to, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in files]
        value = {
            "id": repo,
            "modelId": repo,
            "sha": commit,
            "private": False,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
        }
        return _send(to, 200, json.dumps(value).encode())

    def file(self, to: BaseHTTPRequestHandler, files: dict[str, bytes], revision: str, name: str, body: bool) -> None:
        content = files.get(name)
        if content is None:
            return _send(to, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        headers = {"X-Repo-Commit": OTHER if revision in ("v2", OTHER) else COMMIT, "ETag": f'"{_etag(content)}"'}
        start = 0
        if body and (asked := to.headers.get("Range")):
            self.ranges.append(f"{name} {asked}")
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if body and name in self.cut:
            sent = self.cut.pop(name)
            return _send(to, 206 if start else 200, content[start:], headers, stop_after=sent)
        return _send(to, 206 if start else 200, content[start:], headers, body)


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _send(
    to: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    headers: dict[str, str] | None = None,
    body: bool = True,
    stop_after: int | None = None,
) -> None:
    to.send_response(status)
    for name, value in {"Content-Length": str(len(content)), "Accept-Ranges": "bytes", **(headers or {})}.items():
        to.send_header(name, value)
    to.end_headers()
    if body:
        to.wfile.write(content[:stop_after])
    if stop_after is not None:
        to.wfile.flush()
        to.close_connection = True
        to.connection.shutdown(socket.SHUT_RDWR)  # close() alone leaves the line open while the files on it live


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub({p.name: p.read_bytes() for p in (TINY / "tiny-sudoku").iterdir()})
    yield made
    made.server.shutdown()
    made.server.server_close()


def environment(cache: Path, url: str, offline: bool = False) -> dict[str, str]:
    """This process's variables, with a hub at `url` and what was downloaded from it in `cache`."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    variables |= {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return variables | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }


def loads(cache: Path, url: str, *names: str, offline: bool = False) -> list[str]:
    """What a fresh process says of `fastdllm.load` for each name, one after the other: "loaded FINGERPRINT", or the error's
    type and message. NAME@REVISION names a revision."""
    command = [sys.executable, "-c", LOAD, *(part for name in names for part in name.partition("@")[::2])]
    done = subprocess.run(
        command, env=environment(cache, url, offline), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-len(names) :]


def shipped(name: str) -> str:
    """What such a process says of the folder that the hub serves."""
    return f"loaded {fastdllm.load(name, device='cpu').fingerprint()}"


def test_a_model_is_downloaded_once_and_then_found_offline(hub: Hub, tmp_path: Path) -> None:
    expected = shipped("tiny-sudoku")
    assert loads(tmp_path, hub.url, REPO, REPO) == [expected, expected]
    assert not [r for r in hub.requests if r.startswith("GET") and r.endswith("README.md")], (
        "more than the model was fetched"
    )
    assert sum(r.startswith("GET") and r.endswith("model.safetensors") for r in hub.requests) == 1
    hub.requests.clear()
    assert loads(tmp_path, hub.url, REPO, offline=True) == [expected]
    assert not hub.requests


def test_a_revision_is_what_is_loaded(hub: Hub, tmp_path: Path) -> None:
    loaded, unknown = loads(tmp_path, hub.url, f"{REPO}@v2", f"{REPO}@nothing")
    assert loaded.startswith("loaded ")
    assert any(f"/resolve/{OTHER}/" in r or "/resolve/v2/" in r for r in hub.requests)
    assert unknown.startswith(f"FileNotFoundError | model '{REPO}' has no revision 'nothing' on the hub")


def test_a_download_that_broke_off_is_resumed(hub: Hub, tmp_path: Path) -> None:
    """The hub's client keeps whole pieces of 10 MiB."""
    hub.files = {p.name: p.read_bytes() for p in (TINY / "tiny-llada").iterdir()}
    hub.cut["model.safetensors"] = 11_000_000
    expected = shipped("tiny-llada")
    first, again = loads(tmp_path, hub.url, REPO, REPO)
    assert first == expected or first.startswith("FileNotFoundError | ")
    assert again == expected
    assert "model.safetensors bytes=10485760-" in hub.ranges, "it began anew"


def test_a_file_that_the_repository_lacks_is_named(hub: Hub, tmp_path: Path) -> None:
    lacking = {
        "config.json": "the folder has no config.json",
        "model.safetensors": "no .safetensors file",
        "tokenizer.json": "but no tokenizer.json, nor vocab.json",
    }
    said = loads(tmp_path, hub.url, *(WITHOUT + name for name in lacking))
    for answer, message in zip(said, lacking.values(), strict=True):
        assert answer.startswith("FileNotFoundError | ") and message in answer and "<newline>" not in answer


def test_what_the_hub_does_not_have_or_cannot_give_is_one_line(hub: Hub, tmp_path: Path) -> None:
    (unknown,) = loads(tmp_path, hub.url, "owner/nothing")
    assert unknown.startswith("FileNotFoundError | model 'owner/nothing' is not on the hub, or is private")
    (unreachable,) = loads(tmp_path, "http://127.0.0.1:9", "owner/nothing")
    (offline,) = loads(tmp_path, hub.url, "owner/nothing", offline=True)
    for answer in (unknown, unreachable, offline):
        assert "owner/nothing" in answer and "tiny-llada" in answer and "<newline>" not in answer
    assert "could not be fetched" in unreachable and "could not be fetched" in offline
