# SPDX-License-Identifier: Apache-2.0
"""Evaluate the shipped models under several settings through lm-eval; print, save and plot what each setting buys.

Every run is the command that a user would type, with a fresh process of its own, so that the figures are those of a real
evaluation: accuracy from lm-eval, forwards, tokens and seconds from the decoder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TASK = "gsm_symbolic"
COLUMNS = ("accuracy", "nfe_per_sample", "tokens_per_forward", "tokens_per_second", "speedup", "samples")


@dataclass(frozen=True)
class Run:
    """One row of the table. `baseline` names the row whose tokens/s its speed-up is measured against."""

    label: str
    script: str
    adapter: str
    model: str
    options: str
    baseline: str


def llada(label: str, options: str) -> Run:
    common = "gen_length=256,block_length=32"
    return Run(label, "llada/eval_llada.py", "llada_dist", "tiny-llada", f"{common},{options}", "baseline")


def v2(label: str, options: str) -> Run:
    common = "max_new_tokens=256,bd_size=32,small_block_size=8"
    return Run(label, "v2/eval.py", "fast_dllm_v2", "tiny-fast-dllm-v2", f"{common},{options}", "v2_baseline")


RUNS = {
    "baseline": llada("LLaDA, one token a step, no cache", "steps=256"),
    "prefix": llada("LLaDA, prefix cache", "steps=256,use_cache=True"),
    "parallel": llada("LLaDA, parallel (threshold 0.9)", "threshold=0.9"),
    "prefix_parallel": llada("LLaDA, prefix cache + parallel", "use_cache=True,threshold=0.9"),
    "dual_parallel": llada("LLaDA, dual cache + parallel", "use_cache=True,dual_cache=True,threshold=0.9"),
    "v2_baseline": v2("Fast-dLLM v2, block cache, one token a step", "threshold=1"),
    "v2_parallel": v2("Fast-dLLM v2, block cache + parallel (0.9)", "threshold=0.9"),
}


def evaluate(name: str, run: Run, limit: int) -> dict[str, Any]:
    """Run lm-eval in a process of its own, its progress bars on this terminal; returns a row without its speed-up."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / run.script)]
        command += ["--model", run.adapter, "--model_args", f"pretrained={run.model},{run.options},show_speed=True"]
        command += ["--tasks", TASK, "--apply_chat_template", "--limit", str(limit), "--batch_size", "1"]
        defaults = {"LMEVAL_LOG_LEVEL": "ERROR"}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**defaults, **os.environ, "PYTHONPATH": path}
        done = subprocess.run([*command, "--output_path", folder], env=env, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(f"quickstart: the run {name!r} failed (exit status {done.returncode}); its messages are above")
        (file,) = Path(folder).rglob("results_*.json")
        found = json.loads(file.read_text())
    speed = found["config"]["speed"]
    return {
        "accuracy": found["results"][TASK]["exact_match,strict-match"],
        "nfe_per_sample": speed["nfe"],
        "tokens_per_forward": speed["tokens_per_forward"],
        "tokens_per_second": speed["tokens_per_second"],
        "samples": speed["samples"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    width = max(len(RUNS[name].label) for name in rows)
    head = f"{'setting':{width}}  accuracy  forwards/sample  tokens/forward  tokens/s  speed-up"
    lines = [head, "-" * len(head)]
    for name, row in rows.items():
        figures = f"{row['accuracy']:8.1%}  {row['nfe_per_sample']:15.1f}  {row['tokens_per_forward']:14.2f}"
        lines.append(f"{RUNS[name].label:{width}}  {figures}  {row['tokens_per_second']:8.1f}  {row['speedup']:7.1f}x")
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [RUNS[name].label for name in rows]
    colours = ["#9aa5b1" if RUNS[name].baseline == name else "#2563eb" for name in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(rows) + 1.4), sharey=True, layout="constrained")
    speed = axes[0].barh(labels, [row["tokens_per_second"] for row in rows.values()], color=colours)
    axes[0].bar_label(
        speed, [f"{row['tokens_per_second']:.0f}  ({row['speedup']:.1f}x)" for row in rows.values()], padding=4
    )
    axes[0].set(xlabel="tokens/s", title="Speed (speed-up over the grey bar above)")
    right = axes[1].barh(labels, [100 * row["accuracy"] for row in rows.values()], color=colours)
    axes[1].bar_label(right, [f"{row['accuracy']:.0%}" for row in rows.values()], padding=4)
    axes[1].set(xlabel="exact match, %", title=f"Accuracy on {max(row['samples'] for row in rows.values())} problems")
    axes[1].set_xlim(0, 112)
    axes[0].margins(x=0.25)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=20, help="problems per setting (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the settings")
    parser.add_argument("--output", type=Path, default=ROOT / "results", help="folder of quickstart.json and .png")
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(args.only, start=1):
        print(f"[{number}/{len(args.only)}] {RUNS[name].label}", file=sys.stderr, flush=True)
        started = time.monotonic()
        rows[name] = evaluate(name, RUNS[name], args.limit)
        base = rows.get(RUNS[name].baseline, rows[name])
        rows[name]["speedup"] = rows[name]["tokens_per_second"] / base["tokens_per_second"]
        print(f"      {time.monotonic() - started:.0f} s", file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {name: {column: row[column] for column in COLUMNS} for name, row in rows.items()}
    (args.output / "quickstart.json").write_text(json.dumps({"settings": settings}, indent=2) + "\n")
    plot(rows, args.output / "quickstart.png")
    print(f"\nGSM-Symbolic, {args.limit} problems, batch 1\n\n{table(rows)}\n")
    print(f"written: {args.output / 'quickstart.json'}, {args.output / 'quickstart.png'}")


if __name__ == "__main__":
    main()
