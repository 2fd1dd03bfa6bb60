# SPDX-License-Identifier: Apache-2.0
"""Where the time of one block step goes: a trace, and each kernel's time against the bytes it must move.

    python scripts/profile_step.py --model llada --out results/profile          # published shape, random bf16 weights
    python scripts/profile_step.py --model llada --quantize fp8

Writes trace.json (open it in chrome://tracing or Perfetto) and prints a table: kernel, calls, time of one step, share; above
it, the time to read the weights once at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from bench_decode import SHAPES, Forward, ceilings, random_model, weight_bytes
from torch.profiler import ProfilerActivity, profile

from fastdllm.models.quantize import KINDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llada", choices=list(SHAPES))
    parser.add_argument("--quantize", choices=KINDS)
    parser.add_argument("--width", type=int, default=32, help="positions of the pass")
    parser.add_argument("--keys", type=int, default=1256, help="positions it sees")
    parser.add_argument("--rows", type=int, default=1, help="sequences in the batch")
    parser.add_argument("--out", type=Path, default=Path("results/profile"))
    args = parser.parse_args()

    device = torch.device("cuda")
    peak = ceilings(device, torch.bfloat16)
    model = random_model(args.model, device, args.quantize)
    start = 0 if args.width == args.keys else args.keys - args.width
    step = Forward(model, args.rows, args.width, args.keys, start, min(32, args.width))
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(5):
            step()
        torch.cuda.synchronize()
    args.out.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(args.out / "trace.json"))

    spent: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in json.loads((args.out / "trace.json").read_text())["traceEvents"]:
        if event.get("cat") == "kernel":
            spent[event["name"]][0] += 1
            spent[event["name"]][1] += event["dur"] / 1e3
    total = sum(ms for _, ms in spent.values()) / 5
    floor = weight_bytes(model.network) / peak["copy_gb_s"] / 1e6
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, copy {peak['copy_gb_s']:.0f} GB/s")
    print(f"busy {total:.3f} ms a step; reading the weights once takes {floor:.3f} ms")
    for name, (calls, ms) in sorted(spent.items(), key=lambda item: -item[1][1])[:25]:
        print(f"{ms / 5:9.4f} ms {100 * ms / 5 / total:5.1f} % {int(calls) // 5:5d} x  {name[:90]}")


if __name__ == "__main__":
    main()
