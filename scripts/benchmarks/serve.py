# SPDX-License-Identifier: Apache-2.0
"""The server under load, next to the offline batch of the same requests in the same run.

python -m scripts.benchmarks.serve                                    # a shipped model on this machine
python -m scripts.benchmarks.serve --shape llada --shots 5            # the published 8B shape with random weights, on a GPU
python -m scripts.benchmarks.serve --url http://127.0.0.1:8000        # a server that runs already (replicas, for example)

Requests come at random moments (Poisson arrivals) at each of `--rates`, and once all together (closed loop, `--batch` at a
time), over prompts of the lengths that GSM-Symbolic's problems have, with `--shots` worked examples before each. The load
comes from a process of its own, so that it does not share the server's interpreter. Printed as JSON, one line a setting:
tokens/s, tokens per forward, and seconds to the first text and to the end (median, 99th percentile). The time to the first
text has two parts: `first_forward` (arrival, a row, the opening forward), and from there the forwards until text is final.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch

import fastdllm
from fastdllm import DecodeConfig
from fastdllm.arguments import COUNT, SIZE, Parser, number
from fastdllm.build import assemble, runner
from fastdllm.engine import Request, decode
from fastdllm.models import Model
from fastdllm.models.quantize import KINDS
from fastdllm.shell import one_line
from fastdllm.tasks import TASKS_DIR

RATE = number(float, 1e-3, 1e6)


@dataclass(frozen=True)
class Load:
    """Prompts as token ids, and how many new tokens each asks for."""

    prompts: list[list[int]]
    length: int


def prompts_of(tokenizer: Any, count: int, shots: int, vocab: int) -> list[list[int]]:
    """Token ids of `count` problems, each after `shots` worked examples."""
    path = TASKS_DIR / "gsm_symbolic" / "test.jsonl"
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rng, out = random.Random(0), []
    for i in range(count):
        examples = rng.sample(problems, shots)
        text = "".join(f"Question: {p['question']}\nAnswer: {p['answer']}\n\n" for p in examples)
        text += f"Question: {problems[i % len(problems)]['question']}\nAnswer:"
        out.append([token % vocab for token in tokenizer(text, add_special_tokens=False)["input_ids"]])
    return out


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


# The offline batch.


def offline(model: Model, config: DecodeConfig, load: Load, rows: int) -> dict[str, Any]:
    """All requests in one list, `rows` at a time."""
    requests = [Request(torch.tensor(prompt), load.length, i) for i, prompt in enumerate(load.prompts)]
    run, executor = assemble(model, config), runner(model, config)
    for _ in range(2):  # the first time compiles and captures
        started, forwards, tokens = time.perf_counter(), 0, 0
        for step in decode(model, requests, run, executor, rows=rows):
            for at, result in step.done.items():
                forwards += result.forwards
                tokens += written(result.ids[len(requests[at].prompt) :].tolist(), run.stop_ids)
        seconds = time.perf_counter() - started
    return {"setting": f"offline batch of {rows}", "tokens_per_second": tokens / seconds, "seconds": seconds,
            "tokens": tokens, "tokens_per_forward": tokens / forwards}  # fmt: skip


def written(ids: list[int], stop_ids: Sequence[int]) -> int:
    return next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))


# The server, in this process, and the load, from another.


@contextmanager
def serving(model: Model, config: DecodeConfig, rows: int) -> Iterator[str]:
    """A server around the model; its address."""
    import uvicorn

    from fastdllm.memory import positions_that_fit
    from fastdllm.serving.app import create_app
    from fastdllm.serving.service import Service

    service = Service(model, config, name="model", positions=positions_that_fit(model, rows), rows=rows, max_queue=100_000)
    settings = uvicorn.Config(create_app(service, wait_until_warm=True), host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def measure(url: str, model: str, load: Load, rate: float | None, at_once: int) -> dict[str, Any]:
    """Send the load from another process; its figures. Raises ValueError where the server does not answer."""
    job = {"url": url, "model": model, "prompts": load.prompts, "length": load.length, "rate": rate, "at_once": at_once}
    command = [sys.executable, "-m", "scripts.benchmarks.serve", "--send"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().rpartition("\n")[2].removeprefix("serve: "))
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout)


async def send(job: dict[str, Any]) -> dict[str, Any]:
    """Every request of the load, streamed with its denoising events; the figures over all."""
    import httpx

    rng, limit = random.Random(1), asyncio.Semaphore(job["at_once"] if job["rate"] is None else len(job["prompts"]))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=job["url"], timeout=None, limits=limits) as client:

        async def one(prompt: list[int], seed: int) -> dict[str, float]:
            body = {
                "model": job["model"],
                "prompt": prompt,
                "max_tokens": job["length"],
                "seed": seed,
                "stream": True,
                "stream_options": {"include_usage": True, "include_denoising": job["rate"] is not None},
            }
            async with limit:
                return await stream(client, body)

        started, tasks = time.perf_counter(), []
        for seed, prompt in enumerate(job["prompts"]):
            tasks.append(asyncio.create_task(one(prompt, seed)))
            if job["rate"] is not None:
                await asyncio.sleep(rng.expovariate(job["rate"]))
        results = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - started
    tokens, forwards = sum(r["tokens"] for r in results), sum(r["forwards"] for r in results)
    name = f"{job['rate']:g} requests/s" if job["rate"] is not None else f"{job['at_once']} at a time"
    figures = {"setting": f"server, {name}", "tokens_per_second": tokens / seconds, "seconds": seconds, "tokens": tokens,
               "tokens_per_forward": tokens / forwards}  # fmt: skip
    for key in ("first_forward", "first_text", "end"):
        values = [r[key] for r in results if key in r]
        if values:
            figures[f"{key}_p50"], figures[f"{key}_p99"] = percentile(values, 0.5), percentile(values, 0.99)
    return figures


async def stream(client: Any, body: dict[str, Any]) -> dict[str, float]:
    """One request: seconds to its first forward, first text and end, and what it wrote. ValueError for what the server
    refuses, and for answers that are not those of this project's server."""
    started = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            text = textwrap.shorten((await response.aread()).decode(errors="replace"), 300)
            raise ValueError(f"{client.base_url} answers with status {response.status_code}: {text}")
        try:
            return await read_events(response.aiter_lines(), started)
        except (LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{client.base_url} answers otherwise than `fastdllm serve` ({reason})") from error


async def read_events(lines: AsyncIterator[str], started: float) -> dict[str, float]:
    """The figures of one answer from the lines of its stream; `started`: when it was asked, of `time.perf_counter`."""
    times: dict[str, float] = {}
    async for line in lines:
        if not line.startswith("data: {"):
            continue
        chunk, now = json.loads(line[6:]), time.perf_counter() - started
        if "error" in chunk:
            raise ValueError(chunk["error"]["message"])
        if "denoising" in chunk:
            times.setdefault("first_forward", now)
        elif chunk["choices"] and chunk["choices"][0]["text"]:
            times.setdefault("first_text", now)
        if chunk.get("usage"):
            usage = chunk["usage"]
            return {**times, "end": now, "tokens": usage["completion_tokens"], "forwards": usage["forwards"]}
    raise LookupError("the stream ended before its usage")


def load_model(args: argparse.Namespace, length: int) -> tuple[Model, DecodeConfig]:
    """The model and how it decodes: a shape with random weights decodes a fixed number of tokens a forward to the end."""
    decoding = dict(item.split("=", 1) for item in args.set)
    if args.shape is None:
        return fastdllm.load(args.model, args.device), DecodeConfig(**{"gen_length": length, **decoding})
    from scripts.benchmarks.decode import random_model, usable

    model = random_model(args.shape, usable(args.device or "cuda"), args.quantize)
    model.tokenizer = fastdllm.load("tiny-llada", "cpu").tokenizer  # any: what is written means nothing
    fixed = {"gen_length": length, "decoder": "quota", "steps": max(1, length // args.per_step), "stop_ids": ()}
    return model, DecodeConfig(**{**fixed, **decoding})


def address(text: str) -> str:
    """A type of arguments: where a server is reached, http://HOST:PORT. An empty one would mean a server of our own."""
    try:
        url = urlsplit(text)
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0 and text.isprintable() and " " not in text
    except ValueError:  # of a port that is none, or an address with one bracket
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"must be the address of a server, http://HOST:PORT, not {text[:60]!r}")
    return text


def parser() -> argparse.ArgumentParser:
    out = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--model", default="tiny-llada", help="shipped name, folder or hub id (default tiny-llada)")
    out.add_argument("--shape", choices=("llada", "dream", "v2"), help="instead: a published shape with random weights")
    out.add_argument("--quantize", choices=KINDS, help="weights of a shape in 8 or 4 bits")
    out.add_argument("--per-step", type=COUNT, default=4, help="tokens a forward of a shape (default 4)")
    out.add_argument("--device", help="cpu, cuda, ...")
    out.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of DecodeConfig")
    out.add_argument("--url", type=address, help="a running server instead of one in this process; no offline batch then")
    out.add_argument("--requests", type=COUNT, default=64, help="requests of each setting (default 64)")
    out.add_argument("--length", type=COUNT, default=128, help="new tokens of each (default 128)")
    out.add_argument("--shots", type=SIZE, default=0, help="worked examples before each problem (5 make about 1000 tokens)")
    out.add_argument("--batch", type=COUNT, default=32, help="requests at a time, offline and closed loop (default 32)")
    out.add_argument(
        "--rates", type=number(float, 1e-3, 1e6), nargs="*", default=[1, 2, 4], help="requests a second (default 1 2 4)"
    )
    out.add_argument("--send", action="store_true", help=argparse.SUPPRESS)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    own = parser()
    args = own.parse_args(arguments)
    if args.quantize and not args.shape:
        own.error("--quantize is of a --shape; a checkpoint is measured as it is")
    if args.url and (given := [name for name in ("shape", "device", "set") if getattr(args, name)]):
        own.error(f"--{given[0]} is of a server in this process, not of that at --url")
    if args.send:
        import httpx

        job = json.load(sys.stdin)
        try:
            print(json.dumps(asyncio.run(send(job))))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"{job['url']} does not answer: {str(error) or type(error).__name__}") from error
        return 0
    if args.url:
        tokenizer = fastdllm.load(args.model, "cpu").tokenizer
        load = Load(prompts_of(tokenizer, args.requests, args.shots, 2**31), args.length)
        _report(args, args.url, args.model, load)
        return 0
    model, config = load_model(args, args.length)
    load = Load(prompts_of(model.tokenizer, args.requests, args.shots, model.spec.vocab), args.length)
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    print(json.dumps({"model": model.name, "device": device, "torch": torch.__version__, "requests": args.requests,
                      "prompt_tokens": sum(map(len, load.prompts)) / len(load.prompts), "length": args.length}))  # fmt: skip
    baseline = offline(model, config, load, args.batch)
    print(json.dumps(baseline), flush=True)
    with serving(model, config, max(args.batch, 64 if args.rates else 0)) as url:
        closed = _report(args, url, "model", load)
    share = closed["tokens_per_second"] / baseline["tokens_per_second"]
    print(json.dumps({"server_over_offline": round(share, 3)}))
    return 0


def _report(args: argparse.Namespace, url: str, model: str, load: Load) -> dict[str, Any]:
    """Every setting of the load, printed; the figures of the closed loop."""
    for _ in range(2):  # compiles and captures what the batches meet, as offline
        measure(url, model, load, None, args.batch)
    closed = measure(url, model, load, None, args.batch)
    print(json.dumps(closed), flush=True)
    for rate in args.rates:
        print(json.dumps(measure(url, model, load, rate, 0)), flush=True)
    return closed


if __name__ == "__main__":
    with one_line("serve"):
        sys.exit(main())
