# SPDX-License-Identifier: Apache-2.0
"""When does block diffusion pay? One network, decoded by blocks and one token a forward, in one run.

    python -m scripts.studies.diffusion_pays --output docs/when_diffusion_pays.json     # v2-7B's shape, bf16, on a GPU
    python -m scripts.studies.diffusion_pays --quantize fp8 --output ...                # adds the rows of other weights
    python -m scripts.studies.diffusion_pays --cpu                                      # the shipped tiny model
    python -m scripts.studies.figures pays                                              # the picture
    python -m scripts.studies.tables                                                    # the tables

Both ways have the same weights, kernels, KV store, captured graphs and prompts. Diffusion commits a fixed number of tokens a
step, in sub-blocks of 8 or in whole blocks of 32. Whole answers are timed. The time to capture graphs is left out, because a
process captures once and then answers for hours. Short runs on a GPU are done twice, and the second counts. A point that
fails, or for which `--budget` leaves no time, is named, and the others go on. `--output` is written after every point, so
that a run that is stopped keeps what it measured.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdllm
from fastdllm import whole
from fastdllm.arguments import AMOUNT, COUNT, Parser
from fastdllm.build import assemble
from fastdllm.engine import Request, decode
from fastdllm.models import Model
from fastdllm.models.quantize import KINDS
from fastdllm.runners import cuda_graph, eager
from fastdllm.shell import one_line
from fastdllm.stats import Stats
from scripts.benchmarks.decode import commit, random_model, random_prompts, synchronise, usable
from scripts.studies.autoregression import autoregress

AR, SUB, WHOLE = "autoregression", "sub-blocks of 8", "blocks of 32"
OPTIONS: dict[str, dict[str, Any]] = {
    SUB: {"cache": "sub_block", "small_block_size": 8},
    WHOLE: {"cache": "block", "small_block_size": 32},
}
# Tokens a step, the most telling first: a budget cuts off the end. Sub-blocks of 8 have no more than 8 to commit. Opening
# passes make tokens a forward fewer: 32 a step are 16, 32/3 are 8, and 8 are 6.4.
STEPS: dict[str, tuple[float, ...]] = {SUB: (8 / 3, 8, 4, 1.5), WHOLE: (8 / 3, 8, 32, 4, 16, 32 / 3, 1.5)}
GPU_RUN = {"batches": [1, 8, 32, 64, 128], "prompt": 128, "gen": 256, "budget": 130.0}
CPU_RUN = {"batches": [1, 4], "prompt": 32, "gen": 32, "budget": 45.0}
NOT_REACHED = "not reached before the run was stopped"
SHORT = 1.0  # seconds: runs below it are repeated on a GPU


@dataclass(frozen=True)
class Row:
    """One point. per_step: tokens that a step of diffusion commits. seconds: of the whole batch, without capturing."""

    weights: str
    way: str
    per_step: float
    batch: int
    tokens_per_second: float
    tokens_per_forward: float
    positions_per_token: float
    forwards: int
    seconds: float

    def line(self) -> str:
        pace = "" if self.way == AR else f"{self.per_step:5.2f} a step"
        return (
            f"{self.weights:5s} batch {self.batch:4d}  {self.way:16s} {pace:12s} {self.tokens_per_second:9.0f} tokens/s "
            f"{self.tokens_per_forward:6.2f} tokens per forward {self.positions_per_token:6.2f} positions per token "
            f"{self.seconds:7.2f} s"
        )


class Captured(cuda_graph.Runner):
    """The runner of captured graphs, which says how long it captured."""

    def __init__(self) -> None:
        super().__init__(eager_first=0)
        self.capturing = 0.0

    def _capture(self, canvas: Any, *given: Any) -> Any:
        device = canvas.x.device
        synchronise(device)
        began = time.perf_counter()
        graph = super()._capture(canvas, *given)
        synchronise(device)
        self.capturing += time.perf_counter() - began
        return graph


Runner = Captured | eager.Runner


def diffuse(model: Model, prompts: Sequence[Tensor], gen: int, way: str, per_step: float, runner: Runner) -> Stats:
    """Whole answers by blocks, as `fastdllm.generate` makes them."""
    given = {
        "decoder": "quota",
        "gen_length": gen,
        "steps": max(1, round(gen / per_step)),
        "stop_ids": (),
        "prompt_cache": 0,
    }
    run, stats = assemble(model, fastdllm.DecodeConfig(**given, **OPTIONS[way])), Stats()
    for step in decode(model, [Request(prompt, gen) for prompt in prompts], run, runner):
        stats.take(step)
        for result in step.done.values():
            stats.finish(result, gen)
    return stats


def timed(once: Callable[[], Stats], runner: Runner) -> tuple[Stats, float]:
    """The figures of a run, and its seconds without those of capturing."""
    if not isinstance(runner, Captured):
        stats = once()
        return stats, stats.seconds
    for _ in range(2):
        before = runner.capturing
        stats = once()
        seconds = stats.seconds - (runner.capturing - before)
        if seconds > SHORT:
            break
    return stats, seconds


class Study:
    """Measures points of one model and prints each."""

    def __init__(self, model: Model, weights: str, args: argparse.Namespace, began: float) -> None:
        self.model, self.weights, self.args, self.began = model, weights, args, began
        self.runner: Runner = Captured() if model.device.type == "cuda" else eager.Runner()
        self.warm: set[tuple[str, int]] = set()
        self.took: dict[tuple[str, float], tuple[int, float]] = {}  # batch and seconds of the last point of a setting
        self.rows: list[Row] = []
        self.missing: list[dict[str, Any]] = []
        self.ahead = list(self.points())

    def points(self) -> Iterator[tuple[str, float, int]]:
        """In the order in which they are measured. The largest batch first: its canvas holds the others too."""
        batches = sorted(self.args.batches)
        yield from ((AR, 1.0, batch) for batch in reversed(batches))
        ranks = max(map(len, STEPS.values()))
        for rank in range(ranks):
            for batch in batches:
                yield from ((way, steps[rank], batch) for way, steps in STEPS.items() if rank < len(steps))

    def run(self, after: Callable[[], None]) -> None:
        """Measure every point. after: called when a point is done."""
        while self.ahead:
            way, per_step, batch = self.ahead.pop(0)
            why = ""
            if not self.fits(way, per_step, batch):
                why = "no time left"
            else:
                try:
                    row = self.measure(way, per_step, batch)
                    self.took[way, per_step] = batch, row.seconds
                    self.rows.append(row)
                    print(row.line(), flush=True)
                except (RuntimeError, ValueError) as error:  # of this point; the others go on
                    why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if why:
                print(f"{self.weights:5s} batch {batch:4d}  {way:16s} {per_step:5.2f} a step: {why}", flush=True)
                self.missing.append(self.absent(way, per_step, batch, why))
            after()

    def absent(self, way: str, per_step: float, batch: int, why: str) -> dict[str, Any]:
        return {"weights": self.weights, "way": way, "per_step": round(per_step, 3), "batch": batch, "why": why}

    def found(self) -> dict[str, Any]:
        """What is known so far: the part of the report that grows."""
        done, ahead = len(self.rows) + len(self.missing), [self.absent(*point, NOT_REACHED) for point in self.ahead]
        note = f"The run was stopped after {done} of its {done + len(ahead)} points." if ahead else ""
        return {
            "notes": {self.weights: note} if note else {},
            "rows": [asdict(row) for row in self.rows],
            "missing": self.missing + ahead,
        }

    def fits(self, way: str, per_step: float, batch: int) -> bool:
        """Whether a point may be expected to end within the budget: in a large batch seconds grow with its rows."""
        before, seconds = self.took.get((way, per_step), (batch, 0.0))
        expected = seconds * max(1.0, batch / max(before, 16)) if batch > 16 else seconds
        return time.perf_counter() - self.began + expected < self.args.budget

    def measure(self, way: str, per_step: float, batch: int) -> Row:
        prompts, gen = random_prompts(self.model, batch, self.args.prompt), self.args.gen
        if way == AR:
            if (way, batch) not in self.warm:
                autoregress(self.model, prompts, 2, self.runner)  # compiles what is not captured
            stats, seconds = timed(lambda: autoregress(self.model, prompts, gen, self.runner).stats, self.runner)
        else:
            if (way, batch) not in self.warm:
                diffuse(self.model, prompts, min(32, gen), way, 8 / 3, self.runner)
            stats, seconds = timed(lambda: diffuse(self.model, prompts, gen, way, per_step, self.runner), self.runner)
        self.warm.add((way, batch))
        return Row(
            weights=self.weights,
            way=way,
            per_step=round(per_step, 3),
            batch=batch,
            tokens_per_second=round(stats.tokens / seconds, 1),
            tokens_per_forward=round(stats.tokens_per_forward, 3),
            positions_per_token=round(sum(stats.row_positions) / stats.tokens, 3),
            forwards=stats.forwards,
            seconds=round(seconds, 5),
        )


# What the rows say.


def crossing(rows: Sequence[dict[str, Any]], weights: str, way: str, batch: int) -> tuple[float, str] | None:
    """The least tokens per forward at which a way of diffusion is as fast as autoregression: (it, "=") where it lies between
    two points that were measured, (the least that was measured, "<") where that is faster already, (the most, ">") where
    even that is slower; None where points are missing."""
    mine = [r for r in rows if (r["weights"], r["batch"]) == (weights, batch)]
    aim = [r["tokens_per_second"] for r in mine if r["way"] == AR]
    found = sorted((r["tokens_per_forward"], r["tokens_per_second"]) for r in mine if r["way"] == way)
    if not aim or not found:
        return None
    if found[0][1] >= aim[0]:
        return found[0][0], "<"
    for (x0, y0), (x1, y1) in pairwise(found):
        if y0 < aim[0] <= y1:
            share = math.log(aim[0] / y0) / math.log(y1 / y0)
            return math.exp(math.log(x0) + share * math.log(x1 / x0)), "="
    return found[-1][0], ">"


def merged(report: dict[str, Any], path: Path) -> dict[str, Any]:
    """The report with what an earlier run on the same machine and of the same model found for other weights."""
    if not path.is_file():
        return report
    before = json.loads(path.read_text(encoding="utf-8"))
    if any(before.get(key) != report[key] for key in ("device", "model", "prompt", "gen", "torch")):
        return report
    mine = {row["weights"] for row in [*report["rows"], *report["missing"]]}
    kept = {name: [row for row in before[name] if row["weights"] not in mine] for name in ("rows", "missing")}
    notes = {weights: note for weights, note in before["notes"].items() if weights not in mine}
    return report | {name: kept[name] + report[name] for name in kept} | {"notes": notes | report["notes"]}


def write(report: dict[str, Any], path: Path) -> None:
    """Put the report in the place of the file, at once, so that a run that is stopped leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write_text(path, json.dumps(merged(report, path), indent=1) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", choices=KINDS, help="weights in 8 or 4 bits")
    parser.add_argument("--batches", nargs="+", type=COUNT, help=f"{GPU_RUN['batches']}, on a CPU {CPU_RUN['batches']}")
    parser.add_argument("--prompt", type=COUNT, help="length of the longest prompt; others are up to a quarter shorter")
    parser.add_argument("--gen", type=COUNT, help=f"new tokens: {GPU_RUN['gen']}, on a CPU {CPU_RUN['gen']}")
    parser.add_argument(
        "--budget", type=AMOUNT, help="seconds in all, after which no point begins that would not end in them"
    )
    parser.add_argument("--cpu", action="store_true", help="the shipped tiny model on the CPU")
    parser.add_argument("--output", type=Path, help="JSON file, written after every point; rows of other weights are kept")
    args = parser.parse_args(arguments)
    for name, value in (CPU_RUN if args.cpu else GPU_RUN).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if bad := [n for n in (*args.batches, args.prompt, args.gen) if n < 1]:
        parser.error(f"--batches, --prompt and --gen must be at least 1, not {bad[0]}")
    return args


def main(arguments: list[str] | None = None) -> int:
    began, args = time.perf_counter(), parse(arguments)
    device = usable("cpu" if args.cpu else "cuda")
    if args.cpu:
        model = fastdllm.load("tiny-fast-dllm-v2", device=device, quantize=args.quantize)
    else:
        model = random_model("v2", device, args.quantize)
    weights = args.quantize or str(model.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    report: dict[str, Any] = {
        "model": "tiny-fast-dllm-v2" if args.cpu else "Fast-dLLM-v2 7B's shape with random weights",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "measured": str(date.today()), "commit": commit(), "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None, "python": platform.python_version(),
        "prompt": args.prompt, "gen": args.gen,
    }  # fmt: skip
    print(
        f"{report['device']}, torch {report['torch']}, commit {report['commit']}: {report['model']}, {weights}", flush=True
    )
    study = Study(model, weights, args, began)
    study.run(lambda: write(report | study.found(), args.output) if args.output else None)
    report |= study.found()
    for batch in sorted(args.batches):
        for way in OPTIONS:
            if found := crossing(report["rows"], weights, way, batch):
                print(f"batch {batch:4d}: {way} as fast from {found[1]} {found[0]:.2f} tokens per forward on")
    print(f"{time.perf_counter() - began:.0f} s in all")
    print(json.dumps(report))
    return 0 if study.rows else 1


if __name__ == "__main__":
    with one_line("diffusion_pays"):
        sys.exit(main())
