# SPDX-License-Identifier: Apache-2.0
"""Evaluate a shipped model under several settings; print, save and plot what each of them gains and costs.

Every row is the command that a user would type, `fastdllm eval`, in a process of its own: accuracy from lm-eval; forwards,
tokens and seconds from the decoder. All settings answer the same problems, so accuracies are compared problem by problem.
A shipped model decodes with one thread, so that two settings are measured at a time where there are two cores.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdllm import whole
from fastdllm.arguments import COUNT, Parser, output_folder
from fastdllm.shell import one_line
from scripts.studies.paired import interval

ROOT = Path(__file__).resolve().parents[1]
TASK = "gsm_symbolic_chat"
FILTER = "strict-match"
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One row of the table. reference: the row that its accuracy and its tokens/s are compared with."""

    label: str
    options: str
    model: str = "tiny-llada"
    reference: str = "one_a_step"


RUNS = {
    "one_a_step": Run("one token per step", "decoder=quota,cache=dual"),
    "threshold": Run("threshold 0.9", "threshold=0.9,cache=dual"),
    "paper": Run("preset paper", "preset=paper"),
    "balanced": Run("preset balanced", "preset=balanced"),
    "fast": Run("preset fast", "preset=fast"),
    "exact": Run("preset exact", "preset=exact"),
    "v2_one_a_step": Run("Fast-dLLM v2, one token per step", "decoder=quota", "tiny-fast-dllm-v2", "v2_one_a_step"),
    "v2_balanced": Run("Fast-dLLM v2, preset balanced", "preset=balanced", "tiny-fast-dllm-v2", "v2_one_a_step"),
}
SHOWN = ("one_a_step", "threshold", "paper", "balanced", "fast")  # the others take longer; --only has them


def command(run: Run, limit: int, batch_size: int, folder: str) -> list[str]:
    """The evaluation of a row as a command, which leaves its results in a folder."""
    given = [sys.executable, "-m", "fastdllm.cli", "eval", "--tasks", TASK, "--apply_chat_template", "--log_samples"]
    given += ["--model_args", f"pretrained={run.model},{run.options},show_speed=True"]
    return [*given, "--limit", str(limit), "--batch_size", str(batch_size), "--output_path", folder]


class Evaluation:
    """`fastdllm eval` of one row, in a process of its own.

    progress: show it on this terminal; otherwise what the process says is shown only if it fails.
    """

    def __init__(self, name: str, limit: int, batch_size: int, progress: bool) -> None:
        self.name, self.run = name, RUNS[name]
        self._folder = tempfile.TemporaryDirectory()
        self._said = Path(self._folder.name, "stderr")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {"LMEVAL_LOG_LEVEL": "ERROR", **os.environ, "PYTHONPATH": path}
        with self._said.open("wb") as said:
            messages = None if progress else said
            given = command(self.run, limit, batch_size, self._folder.name)
            self.process = subprocess.Popen(given, env=env, stdout=subprocess.DEVNULL, stderr=messages)

    def row(self) -> Row:
        """Accuracy, whether each problem was solved, and the decoder's figures; SystemExit if the process failed."""
        if self.process.wait():
            sys.stderr.write(self._said.read_text(encoding="utf-8", errors="replace"))
            status = self.process.returncode
            raise SystemExit(f"quickstart: the run {self.name!r} failed (exit status {status}); its messages are above")
        (results,) = Path(self._folder.name).rglob("results_*.json")
        (samples,) = Path(self._folder.name).rglob("samples_*.jsonl")
        speed = json.loads(results.read_text(encoding="utf-8"))["config"]["speed"]
        lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        solved = {line["doc_id"]: line["exact_match"] for line in lines if line.get("filter", FILTER) == FILTER}
        figures = {key: speed[key] for key in ("samples", "nfe", "tokens_per_forward", "tokens_per_second")}
        return {"setting": self.run.label, "solved": [solved[i] for i in sorted(solved)], **figures}

    def close(self) -> None:
        """End the process if it still runs, and remove what it wrote."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._folder.cleanup()


def measure(names: list[str], limit: int, batch_size: int, jobs: int) -> dict[str, Row]:
    """The rows of these settings, `jobs` measured at a time. The first, which takes longest, shows its progress."""
    started, rows, running, waiting = time.monotonic(), dict[str, Row](), list[Evaluation](), list(names)

    def tell(name: str, what: str) -> None:
        print(f"[{names.index(name) + 1}/{len(names)}] {RUNS[name].label}{what}", file=sys.stderr, flush=True)

    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                tell(name, "")
                running.append(Evaluation(name, limit, batch_size, progress=jobs == 1 or name == names[0]))
            for evaluation in [e for e in running if e.process.poll() is not None]:
                rows[evaluation.name] = evaluation.row()
                tell(evaluation.name, f": done, {time.monotonic() - started:.0f} s so far")
                running.remove(evaluation)
                evaluation.close()
            time.sleep(0.1)
    finally:
        for evaluation in running:
            evaluation.close()
    return {name: rows[name] for name in names}


def at_once() -> int:
    """How many settings are measured at a time: two on a CPU of two cores or more, otherwise each has the machine."""
    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def compare(rows: dict[str, Row]) -> None:
    """Add accuracy, the difference from the reference with its 95 % interval (points), and the speed-up."""
    for name, row in rows.items():
        reference = rows.get(RUNS[name].reference, row)
        difference = np.array(row["solved"], float) - np.array(reference["solved"], float)
        low, high = interval(difference)
        row["accuracy"] = float(np.mean(row["solved"]))
        row["difference"], row["low"], row["high"] = (100 * float(x) for x in (difference.mean(), low, high))
        row["speedup"] = row["tokens_per_second"] / reference["tokens_per_second"]


def table(rows: dict[str, Row]) -> str:
    """The rows as Markdown that can also be read as it stands."""
    head = ("setting", "accuracy", "difference (95 %)", "forwards", "tokens/s", "speed-up")
    cells = [head]
    for name, row in rows.items():
        unpaired = RUNS[name].reference == name or RUNS[name].reference not in rows
        gap = "" if unpaired else f"{row['difference']:+.1f} ({row['low']:+.1f}, {row['high']:+.1f})"
        figures = (f"{row['nfe']:.1f}", f"{row['tokens_per_second']:,.0f}", f"{row['speedup']:.1f}")
        cells.append((row["setting"], f"{row['accuracy']:.1%}", gap, *figures))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def plot(rows: dict[str, Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [row["setting"] for row in rows.values()]
    colours = ["#9aa5b1" if RUNS[name].reference == name else "#1d4ed8" for name in rows]
    figure, (speed, right) = plt.subplots(1, 2, figsize=(9, 0.5 * len(rows) + 1.3), sharey=True, layout="constrained")
    bars = speed.barh(labels, [row["tokens_per_second"] for row in rows.values()], color=colours)
    speed.bar_label(bars, [f"{row['tokens_per_second']:,.0f}  ({row['speedup']:.1f} x)" for row in rows.values()], padding=4)
    speed.set(xlabel="tokens/s")
    speed.margins(x=0.3)
    accuracy = [100 * row["accuracy"] for row in rows.values()]
    spread = np.array([(max(0, r["difference"] - r["low"]), max(0, r["high"] - r["difference"])) for r in rows.values()]).T
    bars = right.barh(labels, accuracy, xerr=spread, color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    right.bar_label(bars, [f"{value:.0f} %" for value in accuracy], padding=4)
    problems = max(row["samples"] for row in rows.values())
    right.set(xlabel=f"right answers of {problems}, with the interval of the difference", xlim=(0, 115))
    speed.invert_yaxis()
    for axis in (speed, right):
        axis.spines[["top", "right"]].set_visible(False)
    with whole.replacing(path) as place:
        figure.savefig(place, dpi=150, facecolor="white")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=COUNT, default=100, help="problems per setting, at most 500 (default %(default)s)")
    parser.add_argument("--batch_size", type=COUNT, default=16, help="problems decoded together (default %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(SHOWN), help="which rows; default: all of tiny-llada"
    )
    parser.add_argument(
        "--jobs",
        type=COUNT,
        default=at_once(),
        help="settings measured at a time, on a core each (default %(default)s)",
    )
    parser.add_argument(
        "--output", type=output_folder, default=ROOT / "results", help="folder of quickstart.json, .md and .png"
    )
    args = parser.parse_args(arguments)
    started = time.monotonic()
    rows = measure(list(dict.fromkeys(args.only)), args.limit, args.batch_size, args.jobs)
    compare(rows)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    beside = f", {args.jobs} settings at a time" if args.jobs > 1 else ""
    where = f"GSM-Symbolic, {args.limit} problems, batches of {args.batch_size}{beside}, {device}, torch {torch.__version__}"
    args.output.mkdir(parents=True, exist_ok=True)
    saved = {"where": where, "machine": platform.machine(), "settings": rows}
    whole.write_text(args.output / "quickstart.json", json.dumps(saved, indent=1) + "\n")
    whole.write_text(args.output / "quickstart.md", f"{where}.\n\n{table(rows)}\n")
    plot(rows, args.output / "quickstart.png")
    print(f"\n{where}, {time.monotonic() - started:.0f} s\n\n{table(rows)}\n\nwritten to {args.output}: quickstart.*")


if __name__ == "__main__":
    with one_line("quickstart"):
        main()
