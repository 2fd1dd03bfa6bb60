# SPDX-License-Identifier: Apache-2.0
"""`fastdllm batch in.jsonl out.jsonl`: a file of requests in OpenAI's batch format, answered in one continuous batch.

A line of the output is written whole, under a lock, and forced to the disk. A process that is killed leaves at most one torn
line, which the next writer cuts off. What has an answer in the output is not asked again, so a run goes on where the last
one ended. Under `accelerate launch` every process answers its share of the lines, into the same file.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import sys
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from pydantic import ValidationError
from tqdm import tqdm

from fastdllm import registry
from fastdllm.arguments import Parser
from fastdllm.conversations import check_text
from fastdllm.serving.command import Settings, add_limits, add_model_options, settings
from fastdllm.serving.errors import ApiError, as_api_error
from fastdllm.serving.protocol import ChatBody, CompletionBody, DecideBody, describe
from fastdllm.serving.service import Service


@dataclass(frozen=True)
class Line:
    """One request of the input: where it stood, its own id, the endpoint, the body, the line's length in bytes and a hash of
    it."""

    number: int
    custom_id: str
    url: str
    body: Any
    size: int = 0
    hash: bytes = b""

    def digest(self, options: Mapping[str, Any]) -> str:
        """What the answer depends on, in 64 hexadecimal digits: the line, and the options of the model and of decoding."""
        return hashlib.sha256(self.hash + json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()


def read_lines(path: Path) -> list[Line]:
    """The requests of a file. ValueError naming the line that is none, or whose custom_id another one has."""
    lines: dict[str, Line] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is not JSON ({error})") from error
        if not isinstance(data, dict) or not isinstance(data.get("custom_id"), str) or not isinstance(data.get("url"), str):
            raise ValueError(f"{path}:{number} must be an object with custom_id, method, url and body")
        if data.get("method", "POST") != "POST" or data["url"] not in ENDPOINTS:
            raise ValueError(f"{path}:{number}: allowed are POST and {', '.join(ENDPOINTS)}")
        check_text(data["custom_id"], f"{path}:{number}: custom_id")
        if data["custom_id"] in lines:
            raise ValueError(
                f"{path}:{number}: custom_id {data['custom_id']!r} is that of line {lines[data['custom_id']].number}"
            )
        named = data["custom_id"], data["url"], data.get("body")
        lines[data["custom_id"]] = Line(number, *named, len(raw), hashlib.sha256(raw.strip()).digest())
    return list(lines.values())


START = b'{"id": "batch_req_'  # of every line of output
DIGEST = re.compile("batch_req_([0-9a-f]{64})")


class Lost(RuntimeError):
    """The model answers no more, whatever it is asked: its device has failed, say."""


class Answered(NamedTuple):
    """A line of output: whose answer it is, to which request (see `Line.digest`; None where it does not say), and whether it
    is an error."""

    custom_id: str
    digest: str | None
    failed: bool


class Output:
    """The output file, which several processes append to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def done(self) -> dict[str, Answered]:
        """The lines by custom_id. ValueError where the file holds something else; then nothing in it is changed."""
        if not self.path.exists():
            self.path.open("ab").close()  # so that a folder that is missing or closed shows before anything is computed
        if not self.path.is_file():
            raise ValueError(f"{self.path} is not a file; a batch that can go on needs one for its output")
        with self.path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            found = [answer_of(raw, f"{self.path}:{number}") for number, raw in enumerate(file, start=1)]
            _repair(file)
            return {answer.custom_id: answer for answer in found if answer is not None}

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _repair(file)
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def answer_of(raw: bytes, where: str) -> Answered | None:
    """What a line of output says; None for one that a killed writer left without its end. ValueError for others."""
    try:
        line = json.loads(raw)
        if raw.endswith(b"\n") and "response" in line and isinstance(line["custom_id"], str):
            digest = DIGEST.fullmatch(str(line.get("id")))
            return Answered(line["custom_id"], digest and digest[1], line.get("error") is not None)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    if not raw.endswith(b"\n") and START.startswith(raw[: len(START)]):
        return None
    raise ValueError(f"{where} is not a line of a batch's output; it is left as it is")


def _repair(file: BinaryIO) -> None:
    """Cut off a line without an end, which a writer left that was killed."""
    end = file.seek(0, os.SEEK_END)
    at = end
    while at:
        start = max(0, at - 65536)
        file.seek(start)
        newline = file.read(at - start).rfind(b"\n")
        if newline >= 0:
            at = start + newline + 1
            break
        at = start
    if at < end:
        file.truncate(at)
    file.seek(0, os.SEEK_END)


async def _chat(service: Service, body: Any) -> dict[str, Any]:
    return await service.answer(await service.chat(_unstreamed(ChatBody.model_validate(body))))


async def _completions(service: Service, body: Any) -> dict[str, Any]:
    return await service.answer(await service.completions(_unstreamed(CompletionBody.model_validate(body))))


async def _decide(service: Service, body: Any) -> dict[str, Any]:
    return await service.decide(DecideBody.model_validate(body))


def _unstreamed(body: Any) -> Any:
    if body.stream:
        raise ApiError(400, "a batch is not streamed; leave out stream", "stream")
    return body


ENDPOINTS: dict[str, Callable[[Service, Any], Awaitable[dict[str, Any]]]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completions,
    "/v1/decide": _decide,
}


async def respond(service: Service, line: Line, digest: str) -> dict[str, Any]:
    """The output line of one request: the response, or the error that it got. Raises `Lost`."""
    try:
        status, body = 200, await ENDPOINTS[line.url](service, line.body)
    except Exception as error:
        if service.health == "failed":  # which says nothing about this request, nor about those after it
            raise Lost("the model's device has failed") from error
        known = describe(error) if isinstance(error, ValidationError) else as_api_error(error)
        status, body = known.status, known.body()
    failed = None if status == 200 else {"code": body["error"]["code"] or str(status), "message": body["error"]["message"]}
    response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
    return {"id": f"batch_req_{digest}", "custom_id": line.custom_id, "response": response, "error": failed}


async def answer_all(
    service: Service, lines: Sequence[tuple[Line, str]], output: Output, at_once: int, show: bool = True
) -> int:
    """Answer the lines, each given with its digest, in their order, `at_once` at a time; returns how many got an error.
    Raises `Lost`."""
    failed, waiting = 0, iter(lines)

    async def work() -> None:
        nonlocal failed
        for line, digest in waiting:
            result = await respond(service, line, digest)
            failed += result["error"] is not None
            output.add(result)
            bar.update()

    with tqdm(total=len(lines), desc="answers", disable=not show) as bar:
        await asyncio.gather(*(work() for _ in range(min(at_once, len(lines)))))
    return failed


def length_of(line: Line) -> int:
    """How long a request is, roughly, in characters of its line and of its answer: longest first means little waiting at the
    end, and memory trouble at once."""
    body = line.body if isinstance(line.body, dict) else {}
    wanted = [body.get(name) for name in ("max_tokens", "max_completion_tokens")]
    return line.size + 4 * max([n for n in wanted if isinstance(n, int) and not isinstance(n, bool)], default=256)


def share(lines: Sequence[Line], rank: int, size: int) -> list[Line]:
    """The lines of one process, longest first. It does not depend on what is done already, so that two processes that start
    at different times never take the same line."""
    return sorted(lines, key=lambda line: (-length_of(line), line.number))[rank::size]


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    out = Parser(
        prog=prog,
        description="Answer a file of requests in OpenAI's batch format. A run that was interrupted goes on where it ended.",
        epilog='Each line of the input: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": '
        '{"messages": [...], "max_tokens": 128}}. Under accelerate launch the processes share the lines.',
    )
    out.add_argument("input", type=Path, metavar="IN.jsonl", help="requests, one a line")
    out.add_argument(
        "output", type=Path, metavar="OUT.jsonl", help="responses, one a line, in the order in which they finish"
    )
    add_model_options(out, positional=False)
    add_limits(out)
    return out


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command; returns 0 when every line has an answer, 1 when some got an error or none because the device failed, 2
    for bad options or input."""
    own, args = registry.parse(lambda: parser(prog), arguments)
    try:
        return _run(args)
    except BrokenPipeError:  # whoever read the output is gone, which is no mistake
        raise
    except Lost as error:
        print(f"{own.prog}: {error}; the same command asks again what has no answer in {args.output}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"{own.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    chosen, output = settings(args), Output(args.output)
    if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        raise ValueError(f"{args.output} is the input as well; the responses need a file of their own")
    lines = read_lines(args.input)
    options = {name: getattr(chosen, name) for name in ("model", "revision", "dtype", "quantize", "adapter", "decoding")}
    digests = {line.custom_id: line.digest(options) for line in lines}
    done = {name: answer for name, answer in output.done().items() if name in digests}
    for name, answer in done.items():
        if answer.digest not in (None, digests[name]):
            raise ValueError(
                f"{args.output} answers {name!r} for another body, model or options than now; give another output"
            )
    rank, size = _place()
    own = [(line, digests[line.custom_id]) for line in share(lines, rank, size) if line.custom_id not in done]
    if not lines:
        print(f"{args.input} holds no request", file=sys.stderr)
    if done:
        print(f"{len(done)} of {len(lines)} requests have an answer already", file=sys.stderr)
    failed = sum(answer.failed for answer in done.values())
    if own:
        service = _service(chosen, chosen.device or _own_device(size))
        try:
            failed += asyncio.run(answer_all(service.start(), own, output, 2 * chosen.max_batch, rank == 0))
        finally:
            service.close(timeout=10)
    if failed:
        print(f"{failed} requests got an error; their lines in {args.output} say why", file=sys.stderr)
    return 1 if failed else 0


def _place() -> tuple[int, int]:
    """Which of how many processes this one is, as its launcher says. ValueError where that makes no sense."""
    rank, size = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(f"RANK={rank[:20]!r} and WORLD_SIZE={size[:20]!r}, which a launcher sets, name no process")
    return int(rank), int(size)


def _own_device(size: int) -> str | None:
    """Of several processes on one machine, each takes a GPU of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if size > 1 and torch.cuda.is_available() else None


def _service(chosen: Settings, device: str | None) -> Service:
    # Everything waits here rather than at the door, however long it takes.
    return dataclasses.replace(chosen, device=device, max_queue=10**9, timeout=float("inf")).service()
