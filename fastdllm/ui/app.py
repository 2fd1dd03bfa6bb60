# SPDX-License-Identifier: Apache-2.0
"""The page: `fastdllm app`, `python llada/app.py`, `python v2/app.py`.

It is the server of `fastdllm serve`, on a port of its own and with every shipped model to choose from.
"""

from __future__ import annotations

import argparse
import errno
import socket
import sys
from collections.abc import Sequence

from fastdllm import registry
from fastdllm.arguments import Parser
from fastdllm.loading import add_weight_options, load_options
from fastdllm.models import tiny_names
from fastdllm.ui import options

PORTS = range(7860, 7960)
VISITORS = 16  # in one batch, unless the command line says otherwise


def parser(default_model: str, prog: str | None = None) -> argparse.ArgumentParser:
    from fastdllm.serving.command import add_limits, add_server

    out = Parser(
        prog=prog,
        description="A page that shows a diffusion language model at work: two settings racing on one prompt, and a chat in "
        "which every token tells its forward and its confidence. It is served to this machine only, unless you say "
        "otherwise.",
        epilog="Without --model the other shipped models can be chosen on the page too. The decoding options are what the "
        "page calls the server's own setting.",
    )
    options.add_model_options(out, default_model, more=True)
    add_weight_options(out)
    registry.add_import_option(out)
    options.add_decode_options(out, None)
    add_limits(out, VISITORS)
    add_server(out, None, f"default: the first free one from {PORTS.start}")
    return out


def free_port(host: str, port: int | None) -> int:
    """The port asked for, else the first that is free. Raises OSError when it is taken, or the address is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in (port,) if port is not None else PORTS:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
            except OSError as error:
                if error.errno == errno.EADDRINUSE and port is None:
                    continue
                raise OSError(_why_not(host, candidate, error)) from error
            return candidate
    raise OSError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free; --port takes another one")


def _why_not(host: str, port: int, error: OSError) -> str:
    """Why nothing can listen there: the port is taken or reserved, else the address is none of this machine's."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken; --port takes another one"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} of {host} cannot be used: {error.strerror}; --port takes another one"
    return f"--host {host} is no address of this machine: {error.strerror}; 127.0.0.1 and 0.0.0.0 are"


def main(arguments: Sequence[str] | None = None, default_model: str = "tiny-llada", prog: str | None = None) -> int:
    """The command; serves until interrupted. Returns the exit code: 1 when the address can't be served, 2 for bad options or
    a model that cannot be loaded."""
    from fastdllm.serving.command import Settings, limits, run

    own, args = registry.parse(lambda: parser(default_model, prog), arguments)
    first, *others = args.model or [default_model, *(name for name in tiny_names() if name != default_model)]
    try:
        decoding = options.config_of(args).given()
        chosen = Settings(first, tuple(dict.fromkeys(others)), decoding=decoding, **load_options(args), **limits(args))
    except ValueError as error:
        own.error(str(error))
    try:
        port = free_port(args.host, args.port)
    except OSError as error:
        print(f"fastdllm: {error}", file=sys.stderr)
        return 1
    print(f"fastdllm: loading {', '.join((first, *others))} ...", flush=True)
    try:
        app = chosen.app()
    except (ValueError, OSError) as error:
        print(f"{own.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    shown = f"[{args.host}]" if ":" in args.host else args.host

    def listening() -> None:
        print(f"fastdllm: http://{shown}:{port} in the browser; Ctrl-C ends it", flush=True)

    return run(app, args.host, port, args.log_level, listening)
