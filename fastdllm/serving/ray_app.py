# SPDX-License-Identifier: Apache-2.0
"""The same application as a Ray Serve deployment: replicas on one machine or many, behind Ray's own proxy.

`fastdllm serve MODEL --replicas N` starts it here. On a cluster that runs already, `serve run` takes a config file whose
`import_path` is `fastdllm.serving.ray_app:build`; its `args` are those of `Deployed`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray import serve

from fastdllm.serving.command import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

ONGOING = 0.75  # of a full batch: above it Ray adds a replica, where it may


@dataclasses.dataclass(frozen=True)
class Deployed(Settings):
    """Settings of a deployment. replicas: so many; or between min_replicas and max_replicas, by the requests at hand. gpus,
    cpus: what one replica takes, by default a GPU where there is one, else its share of this machine's cores."""

    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    gpus: float | None = None
    cpus: float | None = None

    @property
    def most(self) -> int:
        return self.replicas or self.max_replicas or self.min_replicas or 1


class Replica:
    """One model on one GPU, or on some cores, and the application around it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = Settings(**settings)
        if cores := os.environ.get("FASTDLLM_REPLICA_CORES"):
            torch.set_num_threads(int(cores))

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = self._settings.app(wait_until_warm=True)
        self._service = app.state.service
        return app

    def check_health(self) -> None:
        """Ray asks now and then, and replaces a replica that raises."""
        if self._service.health == "failed":
            raise RuntimeError("the model's device is lost")


def build(args: dict[str, Any]) -> Application:
    """The application, from the `args` of a config file: the fields of `Deployed`. ValueError names one that is unknown."""
    known = {field.name for field in dataclasses.fields(Deployed)}
    if unknown := set(args) - known:
        raise ValueError(f"unknown argument {min(unknown)!r}; allowed are {', '.join(sorted(known))}")
    return application(Deployed(**args))


def application(settings: Deployed) -> Application:
    """The deployment, not started yet."""
    gpus, cores = _share(settings)
    low, high = settings.min_replicas or 1, settings.max_replicas or settings.min_replicas or 1
    if settings.replicas is None and low > high:
        raise ValueError(f"min_replicas={low} must be at most max_replicas={high}")
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.replicas is None:
        target = max(1, round(ONGOING * settings.max_batch))
        scaling = {"autoscaling_config": {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": target}}
    own = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="fastdllm",
        max_ongoing_requests=settings.max_batch + settings.max_queue,
        graceful_shutdown_timeout_s=settings.timeout,
        health_check_period_s=5,
        ray_actor_options={
            "num_gpus": gpus,
            "num_cpus": cores,
            "runtime_env": {"env_vars": {"FASTDLLM_REPLICA_CORES": str(max(1, int(cores)))}},
        },
        **scaling,
    )
    return deployment.bind(own)


def _share(settings: Deployed) -> tuple[float, float]:
    """(GPUs, cores) of one replica."""
    on_gpu = torch.cuda.is_available() and settings.device != "cpu"
    gpus = settings.gpus if settings.gpus is not None else float(on_gpu)
    if settings.cpus is not None:
        return gpus, settings.cpus
    return gpus, 1.0 if gpus else max(0.1, (os.cpu_count() or 1) / settings.most * 0.9)


def serve_replicas(settings: Settings, args: argparse.Namespace) -> int:
    """Run replicas on this machine until SIGTERM or SIGINT; returns the exit code."""
    for name in ("replicas", "min_replicas", "max_replicas"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if args.replicas and (args.min_replicas or args.max_replicas):
        raise ValueError("--replicas is a fixed number; give it or --min-replicas and --max-replicas")
    scale = {name: getattr(args, name) for name in ("replicas", "min_replicas", "max_replicas")}
    app = application(Deployed(**dataclasses.asdict(settings), **scale))
    connect()
    serve.start(http_options={"host": args.host, "port": args.port})
    try:
        serve.run(app, name="fastdllm", route_prefix="/")
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):  # only now: Ray sets handlers of its own when it starts
            signal.signal(number, lambda *_: stop.set())
        print(f"fastdllm: {settings.model} answers on http://{args.host}:{args.port}", file=sys.stderr, flush=True)
        while not stop.wait(1.0):
            pass
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, else start one on this machine, which nobody else can reach."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports to nobody unless asked to
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(_node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False)
