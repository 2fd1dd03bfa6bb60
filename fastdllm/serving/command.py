# SPDX-License-Identifier: Apache-2.0
"""`fastdllm serve`: the options of a server, one process or several replicas."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import fastdllm
from fastdllm import registry
from fastdllm.arguments import COUNT, SIZE, Parser, number
from fastdllm.build import assemble
from fastdllm.config import DecodeConfig
from fastdllm.engine.admission import ROWS
from fastdllm.loading import PLACE, WEIGHTS, add_place_options, add_weight_options, load_options
from fastdllm.memory import positions_that_fit
from fastdllm.serving.address import OWN_NAMES, check_key, free_port, host_name, is_loopback
from fastdllm.serving.logs import log_to_stderr

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fastdllm.models import Model
    from fastdllm.serving.service import Service

LIMITS = ("max_batch", "max_positions", "max_queue", "timeout")
MOST_ROWS = 2**16  # of a batch: tables of what each row holds are made at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that makes a server, as plain values, so that it can be sent to replicas.

    model: a shipped name, a folder or a hub id.
    others: further models that the page at / offers.
    name: what clients call it; default the same.
    decoding: options of `DecodeConfig`.
    device, dtype, revision, quantize, adapter: as `fastdllm.load` takes them.
    max_batch: requests in one batch.
    max_positions: positions in flight; None for what memory allows.
    max_queue: requests that may wait.
    timeout: seconds for one request.
    api_key, hosts: see `create_app`.
    imports: modules and files that register components of one's own, as `registry.import_modules` takes them; by default
        those of this process.
    """

    model: str = "tiny-llada"
    others: tuple[str, ...] = ()
    name: str | None = None
    decoding: dict[str, Any] = dataclasses.field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    quantize: str | None = None
    adapter: str | None = None
    max_batch: int = ROWS
    max_positions: int | None = None
    max_queue: int = 256
    timeout: float = 600.0
    api_key: str | None = None
    hosts: tuple[str, ...] | None = None
    imports: tuple[str, ...] = dataclasses.field(default_factory=registry.imported)

    def services(self) -> list[Service]:
        """The models, loaded, each with a service that is not started yet; the first is the one under /v1."""
        from fastdllm.serving.service import Service

        registry.import_modules(self.imports)  # a replica is another process
        config, names = DecodeConfig(**self.decoding), (self.model, *self.others)
        loading = {name: getattr(self, name) for name in (*PLACE, *WEIGHTS)}
        models = [fastdllm.load(self.model, **loading)]
        models += [fastdllm.load(name, **{**loading, "adapter": None}) for name in self.others]
        out: list[Service] = []
        for name, model in zip(names, models, strict=True):
            positions = self.max_positions or max(1, positions_that_fit(model, self.max_batch) // len(models))
            out.append(
                Service(
                    model,
                    fitting(model, config) if out else config,
                    name=name if out else self.name or name,
                    positions=positions,
                    rows=self.max_batch,
                    max_queue=self.max_queue,
                    timeout=self.timeout,
                    beside=out[0] if out else None,
                )
            )
        return out

    def service(self) -> Service:
        """The one under /v1."""
        return self.services()[0]

    def app(self, wait_until_warm: bool = False) -> FastAPI:
        """The application around them."""
        from fastdllm.serving.app import create_app

        first, *others = self.services()
        return create_app(first, others=others, api_key=self.api_key, hosts=self.hosts, wait_until_warm=wait_until_warm)


def fitting(model: Model, config: DecodeConfig) -> DecodeConfig:
    """The config, if this model takes it, else its family's own."""
    try:
        assemble(model, config)
    except ValueError:
        return DecodeConfig()
    return config


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    out = Parser(
        prog=prog,
        description="Serve a diffusion language model over OpenAI's API: chat, completions, streaming, typed answers. At / "
        "is a page to try it.",
        epilog="Per-request numbers of decoding (temperature, threshold, ...) come with each request; the options here hold "
        "for all. docs/serving.md has examples.",
    )
    add_model_options(out)
    add_limits(out)
    add_server(out, 8000, "default 8000")
    replicas = out.add_argument_group("several replicas, by Ray Serve (pip install 'ray[serve]')")
    replicas.add_argument("--replicas", type=COUNT, metavar="N", help="so many, one GPU each or a share of the CPU")
    replicas.add_argument(
        "--min-replicas", type=COUNT, metavar="N", help="scale with the requests at hand, at least so many"
    )
    replicas.add_argument("--max-replicas", type=COUNT, metavar="N", help="and at most so many")
    return out


def add_server(out: argparse.ArgumentParser, port: int | None, default: str) -> None:
    """Where it listens, and to whom; shared with `fastdllm app`."""
    group = out.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="interface to listen on (default: this machine only)")
    group.add_argument("--port", type=number(int, 0, 2**16 - 1), default=port, help=f"port ({default})")
    group.add_argument(
        "--api-key",
        default=os.environ.get("FASTDLLM_API_KEY"),
        metavar="KEY",
        help="what clients must send as a bearer token (default: the variable FASTDLLM_API_KEY, else no key)",
    )
    group.add_argument(
        "--allowed-host",
        dest="hosts",
        action="append",
        metavar="NAME",
        help="name under which clients may address the server; may be repeated (default: on this machine's own interface "
        "its names, on others any)",
    )
    level = "info" if port else "warning"
    choices = ("debug", "info", "warning", "error")
    group.add_argument("--log-level", default=level, choices=choices, help=f"(default {level})")


def add_model_options(out: argparse.ArgumentParser, positional: bool = True) -> None:
    """The model and how it decodes; shared with `fastdllm batch`."""
    group = out.add_argument_group("model")
    help_text = "shipped name, local folder or hub id (default tiny-llada)"
    if positional:
        group.add_argument("model", nargs="?", metavar="MODEL", help=help_text)
        group.add_argument("--model", dest="named", help=argparse.SUPPRESS)  # as the other commands have it
    else:
        group.add_argument("--model", default="tiny-llada", metavar="MODEL", help=help_text)
    group.add_argument("--served-model-name", dest="name", metavar="NAME", help="what clients call it (default: MODEL)")
    add_place_options(group)
    add_weight_options(group)
    registry.add_import_option(out)
    group = out.add_argument_group("decoding")
    group.add_argument("--preset", metavar="NAME", help="a setting by name: exact, paper, balanced, fast")
    group.add_argument("--cache", metavar="NAME", help="what is kept between forwards (default: the family's)")
    group.add_argument("--decoder", metavar="NAME", help="what a forward commits (default threshold)")
    group.add_argument("--gen-length", type=int, metavar="N", help="length of an answer that asks for none (default 256)")
    group.add_argument(
        "--set",
        dest="others",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of fastdllm.DecodeConfig; may be repeated",
    )


def add_limits(out: argparse.ArgumentParser, rows: int = ROWS) -> None:
    group = out.add_argument_group("limits")
    count = number(int, 1, MOST_ROWS)
    group.add_argument("--max-batch", type=count, default=rows, metavar="N", help=f"requests in one batch (default {rows})")
    group.add_argument(
        "--max-positions", type=COUNT, metavar="N", help="positions of prompts and answers in flight (default: what fits)"
    )
    group.add_argument("--max-queue", type=SIZE, default=256, metavar="N", help="requests that may wait (default 256)")
    group.add_argument(
        "--timeout",
        type=number(float, 1e-3, 1e9),
        default=600.0,
        metavar="SECONDS",
        help="deadline of a request at most (default 600)",
    )


def settings(args: argparse.Namespace) -> Settings:
    """The command line as settings; ValueError names what is wrong."""
    decoding = {k: getattr(args, k) for k in ("preset", "cache", "decoder", "gen_length") if getattr(args, k) is not None}
    for item in args.others:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set {item!r} must be NAME=VALUE")
        decoding[name.replace("-", "_")] = value
    DecodeConfig(**decoding)  # before the weights are read: a bad option is an error at once
    named = getattr(args, "named", None)
    if named and args.model:
        raise ValueError(f"--model {named} and MODEL {args.model} are the same option; give one of them")
    model = named or args.model or "tiny-llada"
    return Settings(model=model, name=args.name, decoding=decoding, **load_options(args), **limits(args))


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_limits` and `add_server` read, as fields of `Settings`; ValueError for what makes no sense."""
    host, hosts, api_key = (getattr(args, name, None) for name in ("host", "hosts", "api_key"))
    if host is not None and not host.strip():  # sockets take it for all interfaces
        raise ValueError("--host is empty; 127.0.0.1 is this machine only, 0.0.0.0 every interface")
    if hosts is None and host is not None and is_loopback(host):
        hosts = dict.fromkeys([*OWN_NAMES, host])
    names = None if hosts is None else tuple(map(host_name, hosts))
    if api_key is not None:
        check_key(api_key)
    return {**{name: getattr(args, name) for name in LIMITS}, "api_key": api_key, "hosts": names}


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """The command; returns the exit code: 0 after an orderly end, 2 for bad options, an address that cannot be had or
    a model that cannot be loaded."""
    own, args = registry.parse(lambda: parser(prog), arguments)
    try:
        chosen = settings(args)
        if args.replicas or args.max_replicas or args.min_replicas:
            from fastdllm.serving.ray_app import serve_replicas

            log_to_stderr(args.log_level)
            return serve_replicas(chosen, args)
        free_port(args.host, [args.port])
        app = chosen.app()
    except (ValueError, OSError) as error:
        print(f"{own.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return run(app, args.host, args.port, args.log_level)


def run(app: FastAPI, host: str, port: int, log_level: str, listening: Callable[[], None] = lambda: None) -> int:
    """Serve until SIGTERM or SIGINT; then take no further requests, finish those at work, and return 0.

    listening: called as soon as the address can be reached.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                listening()

    log_to_stderr(log_level)

    def ended(signum: int, frame: FrameType | None) -> None:
        """uvicorn has shut down in order and raises the signal once more, which would end the process by it."""

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, ended)
    # No handlers of uvicorn's own: they write on the event loop, which waits where nobody reads the output (`logs.py`).
    config = uvicorn.Config(app, host=host, port=port, log_config=None, log_level=log_level, timeout_keep_alive=30)
    server = Server(config)
    try:
        server.run()
    except SystemExit as stopped:  # the port is taken, or startup failed; uvicorn has said why
        return int(stopped.code or 1)
    return 0 if server.started else 1
