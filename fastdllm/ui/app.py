# SPDX-License-Identifier: Apache-2.0
"""The page: `fastdllm app`, `python llada/app.py`, `python v2/app.py`.

It is the server of `fastdllm serve`, on a port of its own and with every shipped model to choose from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastdllm import registry
from fastdllm.arguments import Parser
from fastdllm.loading import add_weight_options, load_options
from fastdllm.models import tiny_names
from fastdllm.serving.address import free_port
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


def main(arguments: Sequence[str] | None = None, default_model: str = "tiny-llada", prog: str | None = None) -> int:
    """The command; serves until interrupted. Returns the exit code: 2 for bad options, an address that cannot be
    had or a model that cannot be loaded."""
    from fastdllm.serving.command import Settings, limits, run

    own, args = registry.parse(lambda: parser(default_model, prog), arguments)
    first, *others = args.model or [default_model, *(name for name in tiny_names() if name != default_model)]
    try:
        decoding = options.config_of(args).given()
        chosen = Settings(first, tuple(dict.fromkeys(others)), decoding=decoding, **load_options(args), **limits(args))
    except ValueError as error:
        own.error(str(error))
    try:
        port = free_port(args.host, PORTS if args.port is None else [args.port])
    except OSError as error:
        print(f"fastdllm: {error}", file=sys.stderr)
        return 2
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
