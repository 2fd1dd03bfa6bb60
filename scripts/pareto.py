# SPDX-License-Identifier: Apache-2.0
"""Accuracy against forwards: decoders x caches x thresholds on GSM-Symbolic, paired with one token per step.

    python -m scripts.pareto run --model tiny-llada --split validation --limit 150
    python -m scripts.pareto run --model tiny-llada --split test --settings quota+dual threshold=0.9+dual frechet=0.25+lazy
    python -m scripts.pareto report --model tiny-llada --split test --summary docs/frontier

A setting reads decoder[=value][:option=value...]+cache[:option=value...], with any option of DecodeConfig. `run` appends a
line per problem to results/pareto/MODEL-TEMPLATE-SPLIT.jsonl and leaves out what is there already, so it may be stopped at
any time. `report` writes the table (CSV, JSON) and the plot of the frontier.

Which of two decoders looks better changes with the prompt, hence two templates: "chat" (the checkpoint's own) and "plain"
(Question: ... Answer:). An interval is a paired bootstrap over problems; `p` is McNemar's exact test on the problems that
only one of the two solves; `same` the share of answers that are the same tokens.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import fastdllm
from fastdllm import registry

ROOT = Path(__file__).resolve().parents[1]
TASK = ROOT / "fastdllm" / "tasks" / "gsm_symbolic"
RESULTS = ROOT / "results" / "pareto"
REFERENCE = "quota+dual"
CHUNK = 50  # problems between two writes
SCREEN = [
    *(f"threshold={t}+dual" for t in (0.9, 0.7, 0.5)),
    REFERENCE,
    *(f"frechet={d}+dual" for d in (0.25, 0.0, -0.5)),
    *("threshold=0.9+lazy:refresh_blocks=2", "threshold=0.9+lazy:refresh_blocks=64"),
    *("local_leap+dual", "local_leap:threshold=0.9:relaxed=0.5+dual"),
    *("hierarchical+dual", "hierarchical:threshold=0.8:low=0.3+dual"),
    *("factor=1.0+dual", "entropy_bound=0.3+dual", "progress_threshold=0.9:alpha=0.6+dual", "lopa+dual"),
    *("threshold=0.9+none", "threshold=0.9+prefix", "threshold=0.9+vicinity"),
    *(f"threshold=0.9+suffix_window:suffix={s}" for s in (0, 32)),
    *("draft_verify+dual", "wino+dual", "quota+top_rho"),
]


def parse(setting: str) -> dict[str, Any]:
    """A setting's text as options of `DecodeConfig`."""
    options: dict[str, Any] = {}
    for kind, part in zip(("decoder", "cache"), setting.split("+"), strict=True):
        name, *more = part.split(":")
        name, _, level = name.partition("=")
        options[kind] = name
        if level:
            options[next(iter(registry.options(f"{kind}s", name)))] = level
        options |= dict(item.split("=", 1) for item in more)
    return options


def problems(split: str, limit: int) -> list[dict[str, str]]:
    lines = (TASK / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def result(text: str) -> str | None:
    """The number after the last "####", as the task compares it."""
    found = re.findall(r"####\s*(-?[0-9.,]+)", text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def prompt(question: str, template: str) -> Any:
    return f"Question: {question}\nAnswer:" if template == "plain" else [{"role": "user", "content": question}]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run(args: argparse.Namespace, path: Path) -> None:
    """Answer what is missing, a chunk of problems at a time."""
    model = fastdllm.load(args.model, device=args.device)
    todo, done = problems(args.split, args.limit), {(x["setting"], x["problem"]) for x in lines_of(path)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(args.settings) * len(todo), unit="problem") as bar, path.open("a", encoding="utf-8") as file:
        for setting in args.settings:
            missing = [i for i in range(len(todo)) if (setting, i) not in done]
            bar.update(len(todo) - len(missing))
            bar.set_description(setting)
            for chunk in (missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)):
                began = time.perf_counter()
                out = fastdllm.generate(
                    model,
                    [prompt(todo[i]["question"], args.template) for i in chunk],
                    gen_length=args.gen_length,
                    batch_size=args.batch_size,
                    **{"block_length": args.block_length, **parse(setting)},
                )
                seconds = (time.perf_counter() - began) / len(chunk)
                for row, i in enumerate(chunk):
                    line = {
                        "setting": setting,
                        "problem": i,
                        "correct": result(out.texts[row]) == result(todo[i]["answer"]),
                        "forwards": out.stats.row_forwards[row],
                        "positions": out.stats.row_positions[row],
                        "tokens": out.stats.row_tokens[row],
                        "seconds": seconds,
                        "answer": hashlib.sha1(out.sequences[row].numpy().tobytes()).hexdigest()[:12],
                    }
                    file.write(json.dumps(line) + "\n")
                file.flush()
                bar.update(len(chunk))


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p: chance of a split at least this uneven of `lost + won` disagreements between equals."""
    n, k = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def interval(difference: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of per-problem differences [N]."""
    rng = np.random.default_rng(0)
    means = difference[rng.integers(0, len(difference), (draws, len(difference)))].mean(1)
    return tuple(np.percentile(means, (2.5, 97.5)).tolist())


def summarise(lines: list[dict[str, Any]], paired_with: str) -> list[dict[str, Any]]:
    """One row per setting that has answered every problem of the reference, most forwards first."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        by.setdefault(line["setting"], {})[line["problem"]] = line
    if paired_with not in by:
        raise SystemExit(f"no lines of {paired_with}, which the others are paired with")
    reference, rows = by[paired_with], []
    for setting, answers in by.items():
        if answers.keys() != reference.keys():
            print(f"{setting}: {len(answers)} of {len(reference)} problems, left out")
            continue
        keys = sorted(answers)
        column = {f: np.array([answers[i][f] for i in keys], float) for f in ("correct", *COSTS)}
        difference = column["correct"] - np.array([reference[i]["correct"] for i in keys], float)
        low, high = interval(difference)
        rows.append(
            {
                "setting": setting,
                "problems": len(keys),
                "accuracy": column["correct"].mean(),
                "difference": difference.mean(),
                "low": low,
                "high": high,
                "p": mcnemar(int((difference < 0).sum()), int((difference > 0).sum())),
                "same": np.mean([answers[i]["answer"] == reference[i]["answer"] for i in keys]),
                "forwards": column["forwards"].mean(),
                "positions": column["positions"].mean(),
                "tokens_per_forward": column["tokens"].sum() / column["forwards"].sum(),
                "tokens_per_second": column["tokens"].sum() / column["seconds"].sum(),
            }
        )
    return sorted(rows, key=lambda r: -r["forwards"])


COSTS = ("forwards", "positions", "tokens", "seconds")


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Accuracy over forwards, one colour a decoder; the line joins the settings that no other one beats in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=110)
    names = sorted({r["setting"].split("+")[0].split("=")[0].split(":")[0] for r in rows})
    for i, name in enumerate(names):
        own = [r for r in rows if re.split("[+=:]", r["setting"])[0] == name]
        x, y = [r["forwards"] for r in own], [100 * r["accuracy"] for r in own]
        axes.plot(x, y, "osD^v<>P*X"[i % 10], color=f"C{i % 10}", label=name, alpha=0.8)
    best, frontier = -1.0, []
    for r in sorted(rows, key=lambda r: (r["forwards"], -r["accuracy"])):
        if r["accuracy"] > best:
            best = r["accuracy"]
            frontier.append(r)
    axes.plot([r["forwards"] for r in frontier], [100 * r["accuracy"] for r in frontier], "k-", lw=0.8, alpha=0.5)
    axes.set(xscale="log", xlabel="forwards per answer", ylabel="accuracy, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def report(args: argparse.Namespace, path: Path) -> None:
    """Table and plot of what has been run so far, beside the lines; with --summary, JSON and plot at that path too."""
    rows = summarise(lines_of(path), args.reference)
    about = {
        "model": args.model,
        "template": args.template,
        "split": args.split,
        "reference": args.reference,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for stem in [path.with_suffix(""), *([args.summary] if args.summary else [])]:
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(json.dumps({"about": about, "settings": rows}, indent=1) + "\n")
        plot(rows, stem.with_suffix(".png"), f"{args.model}, {args.template} prompt, {rows[0]['problems']} problems")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    print("| setting | accuracy | difference (95 %) | p | same | forwards | positions | tokens/forward | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['setting']} | {100 * r['accuracy']:.1f} | {100 * r['difference']:+.1f} "
            f"({100 * r['low']:+.1f}, {100 * r['high']:+.1f}) | {r['p']:.2f} | {100 * r['same']:.0f} "
            f"| {r['forwards']:.1f} | {r['positions']:.0f} | {r['tokens_per_forward']:.2f} | {r['tokens_per_second']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--template", choices=("chat", "plain"), default="chat")
    parser.add_argument("--settings", nargs="+", default=SCREEN)
    parser.add_argument("--reference", default=REFERENCE, help="the setting that the others are paired with")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--gen_length", type=int, default=256)
    parser.add_argument("--block_length", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device")
    parser.add_argument("--summary", type=Path, help="also write JSON and plot to this path, without suffix")
    args = parser.parse_args()
    for setting in args.settings:
        fastdllm.DecodeConfig(**parse(setting))
    path = RESULTS / f"{Path(args.model).name}-{args.template}-{args.split}.jsonl"
    {"run": run, "report": report}[args.action](args, path)


if __name__ == "__main__":
    main()
