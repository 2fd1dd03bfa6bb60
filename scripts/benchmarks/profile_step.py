# SPDX-License-Identifier: Apache-2.0
"""Where the time of one forward goes: a trace, and each operation's kernels against the bytes that it must move.

    python -m scripts.benchmarks.profile_step --model llada --out results/profile     # published shape, random bf16 weights
    python -m scripts.benchmarks.profile_step --model llada --quantize fp8
    python -m scripts.benchmarks.profile_step --cpu                                    # the shipped tiny model

Writes trace.json (open it in chrome://tracing or Perfetto) and prints a table: per operation of `fastdllm.kernels`, launched
one by one, the time of a call, its floor (what it must read and write, once, at the copy bandwidth measured in the same run)
and its share of a forward, and below it its kernels. Above the table stands the forward captured as a graph, where
launches cost less and kernels overlap.
"""

from __future__ import annotations

import argparse
import inspect
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import fastdllm
from fastdllm import kernels
from fastdllm.arguments import COUNT, Parser, output_folder
from fastdllm.models.quantize import KINDS
from fastdllm.shell import one_line
from scripts.benchmarks.decode import (
    SHAPES,
    TINY,
    Forward,
    ceilings,
    median_ms,
    random_model,
    synchronise,
    usable,
    weight_bytes,
)

OPERATIONS = (
    "rmsnorm", "linear_rmsnorm", "linear_rmsnorm_fp8", "linear_silu_mul", "linear_silu_mul_fp8", "experts_rmsnorm",
    "linear_rope_store", "attention", "head_confidence",
)  # fmt: skip
TABLES = ("k_store", "v_store", "cos", "sin")  # a call touches only some of their rows
FORWARDS = 5


def of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among these."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, kernels.Quantized):
            yield from (x.values, x.scale)


def moved(arguments: dict[str, Any], results: tuple[Any, ...]) -> int:
    """Bytes that a call must read and write once: its tensors, and of the KV store the slots that it reads or writes."""
    tensors = list(of(x for name, x in arguments.items() if name not in TABLES))
    given = {x.data_ptr() for x in tensors}
    tensors += [x for x in of(results) if x.data_ptr() not in given]
    total = sum(x.nbytes for x in tensors)
    if "k_store" in arguments:
        k = arguments["k_store"]
        positions = arguments["kv_len"].amax(1).sum() if "kv_len" in arguments else arguments["pos"].numel()
        total += 2 * int(positions) * k.shape[1] * k.shape[3] * k.itemsize
    return total


@contextmanager
def recorded() -> Iterator[dict[str, int]]:
    """Mark the launches of each operation with its name and shape. Yields name -> bytes of one call, filled as they come."""
    found: dict[str, int] = {}

    def marked(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(operation)

        def call(*given: Any, **named: Any) -> Any:
            arguments = signature.bind(*given, **named).arguments
            first = next(iter(arguments.values()))
            named_by = first if name == "rmsnorm" else arguments.get("weight", arguments.get("gate_up", first))
            label = f"{name.removesuffix('_fp8')} {'x'.join(map(str, named_by.shape))}"
            with record_function(label):
                out = operation(*given, **named)
            if label not in found:
                found[label] = moved(arguments, out if isinstance(out, tuple) else (out,))
            return out

        return call

    kept = {name: getattr(kernels, name) for name in OPERATIONS}
    try:
        for name, operation in kept.items():
            setattr(kernels, name, marked(name, operation))
        yield found
    finally:
        for name, operation in kept.items():
            setattr(kernels, name, operation)


def attribute(events: list[dict[str, Any]], cuda: bool) -> dict[str, dict[str, tuple[int, float]]]:
    """Operation -> kernel -> (launches, microseconds); a kernel belongs to the mark within which it was launched. Without a
    device, where nothing is launched, the marks themselves are what took time."""
    marks = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "user_annotation")
    marks = [m for m in marks if m[2].split()[0] in OPERATIONS]
    found: dict[str, dict[str, tuple[int, float]]] = defaultdict(lambda: defaultdict(lambda: (0, 0.0)))

    def add(label: str, kernel: str, microseconds: float) -> None:
        calls, total = found[label][kernel]
        found[label][kernel] = (calls + 1, total + microseconds)

    if not cuda:
        for start, stop, label in marks:
            add(label, "on the host", stop - start)
        return found
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    starts = [m[0] for m in marks]
    for e in events:
        if e.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        at = launched.get(e["args"].get("correlation"), -1.0)
        i = bisect_right(starts, at) - 1
        add(marks[i][2] if i >= 0 and at <= marks[i][1] else "other", e["name"], e["dur"])
    return found


def table(found: dict[str, dict[str, tuple[int, float]]], nbytes: dict[str, int], gb_s: float) -> list[str]:
    """One line per operation, the longest first, and one below it for each of its kernels if it launches several."""
    totals = {label: sum(us for _, us in own.values()) for label, own in found.items()}
    whole, lines = sum(totals.values()), []
    for label in sorted(found, key=lambda x: -totals[x]):
        # A call launches each of its kernels once; what is outside the operations has no calls and no floor.
        calls = max(n for n, _ in found[label].values()) if label in nbytes else FORWARDS
        floor = f"{nbytes[label] / gb_s / 1e3:9.2f}" if label in nbytes else f"{'':9s}"
        ratio = f"{totals[label] / calls / (nbytes[label] / gb_s / 1e3):8.2f}" if label in nbytes else f"{'':8s}"
        lines.append(
            f"{label:38s}{calls // FORWARDS:6d}{totals[label] / calls:10.2f}{floor}{ratio}"
            f"{totals[label] / FORWARDS / 1e3:10.4f}{100 * totals[label] / whole:7.1f} %"
        )
        several = sorted(found[label].items(), key=lambda item: -item[1][1]) if len(found[label]) > 1 else []
        lines += [f"    {name[:56]:58s} {n // FORWARDS:5d} x {us / n:8.2f}" for name, (n, us) in several[:8]]
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada", choices=list(SHAPES))
    parser.add_argument("--quantize", choices=KINDS)
    parser.add_argument("--width", type=COUNT, default=32, help="positions of the pass")
    parser.add_argument("--keys", type=COUNT, default=1256, help="positions it sees")
    parser.add_argument("--rows", type=COUNT, default=1, help="sequences in the batch")
    parser.add_argument("--cpu", action="store_true", help="the shipped tiny model on the CPU")
    parser.add_argument("--out", type=output_folder, default=Path("results/profile"))
    args = parser.parse_args(arguments)
    if args.cpu and args.model not in TINY:
        parser.error(f"--cpu: no shipped model has the format of {args.model}")

    device = usable("cpu" if args.cpu else "cuda")
    if args.cpu:
        model = fastdllm.load(TINY[args.model], device=device, quantize=args.quantize)
    else:
        model = random_model(args.model, device, args.quantize)
    peak = ceilings(device, model.dtype)
    start = 0 if args.width == args.keys else args.keys - args.width
    step = Forward(model, args.rows, args.width, args.keys, start, min(32, args.width))
    whole = median_ms(step, device, 20)
    with recorded() as nbytes:
        for _ in range(3):
            step.run()
        synchronise(device)
        activities = [ProfilerActivity.CPU] + ([] if args.cpu else [ProfilerActivity.CUDA])
        with profile(activities=activities) as seen:
            for _ in range(FORWARDS):
                step.run()
            synchronise(device)
    args.out.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(args.out / "trace.json"))
    found = attribute(json.loads((args.out / "trace.json").read_text(encoding="utf-8"))["traceEvents"], not args.cpu)

    name = "CPU" if args.cpu else torch.cuda.get_device_name(device)
    print(
        f"{name}, torch {torch.__version__}, copy {peak['copy_gb_s']:.0f} GB/s; {model.name}, {args.quantize or model.dtype}"
    )
    print(
        f"{args.rows} x {args.width} positions, {args.keys} keys: {whole:.3f} ms"
        f"{' as a graph' if step.graph else ''}; reading the weights once takes"
        f" {weight_bytes(model.network, args.rows * args.width) / peak['copy_gb_s'] / 1e6:.3f} ms"
    )
    print(f"{'operation':38s}{'calls':>6s}{'us':>10s}{'floor':>9s}{'x floor':>8s}{'ms':>10s}{'share':>9s}")
    print("\n".join(table(found, nbytes, peak["copy_gb_s"])))


if __name__ == "__main__":
    with one_line("profile_step"):
        main()
