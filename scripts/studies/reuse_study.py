# SPDX-License-Identifier: Apache-2.0
"""What layer reuse and TRIM save and cost on a trained model: accuracy against layer-token products and tokens/s.

    python -m scripts.studies.reuse_study                     # tiny-fast-dllm-v2, 500 held-out problems, all settings
    python -m scripts.studies.reuse_study --limit 100 --threshold 0.9 --caches block

Sweeps reuse_k, layer_subset, reuse_mode and trim_ratio under each cache at one threshold, each setting on the same problems,
and compares each with k=1 problem by problem (the interval is a paired bootstrap). Finished settings are kept in the output
folder and not run again. Writes study.json, study.md and study.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import fastdllm
from fastdllm import whole
from fastdllm.arguments import COUNT, SHARE, Parser, output_folder
from fastdllm.shell import one_line
from fastdllm.tasks import TASKS_DIR
from scripts.results import read_json
from scripts.studies.paired import interval

PLAIN: dict[str, Any] = {}


def settings(layers: int) -> list[dict[str, Any]]:
    """k=1 first; then thirds of the depth, and all of it but layer 0.

    trim_ratio None reuses every position; mode "output" is the ablation.
    """
    grid = [PLAIN]
    for subset in ("first", "middle", "last"):
        for k, ratio in ((2, None), (2, 0.25), (3, None), (32, 0.0), (32, 0.25)):
            grid.append({"reuse_k": k, "layer_subset": subset, "trim_ratio": ratio})
        grid.append({"reuse_k": 2, "layer_subset": subset, "reuse_mode": "output"})
    for k, ratio in ((2, 0.0), (2, 0.25), (32, 0.25), (32, 0.5)):
        grid.append({"reuse_k": k, "layer_subset": "+".join(map(str, range(1, layers))), "trim_ratio": ratio})
    return grid


def name(setting: dict[str, Any]) -> str:
    if not setting:
        return "k=1"
    trim = setting.get("trim_ratio")
    parts = [f"k={setting['reuse_k']}", setting["layer_subset"], setting.get("reuse_mode", "delta")]
    return " ".join(parts) + (f" trim={trim}" if trim is not None else "")


def correct(text: str, gold: str) -> bool:
    """Exact match of what follows the last `####`, as the task's strict filter."""
    answer = text.rpartition("####")[2].strip().replace(",", "") if "####" in text else ""
    return answer == gold.rpartition("####")[2].strip().replace(",", "")


def measure(model: Any, problems: list[dict[str, str]], options: dict[str, Any], batch_size: int) -> dict[str, Any]:
    prompts = [[{"role": "user", "content": p["question"]}] for p in problems]
    out = fastdllm.generate(model, prompts, batch_size=batch_size, **options)
    right = [correct(t, p["answer"]) for t, p in zip(out.texts or [], problems, strict=True)]
    return {**out.stats.summary(), "right": right, "accuracy": sum(right) / len(right)}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, (key, label) in zip(
        axes, (("share", "layer-token products, k=1 is 1"), ("tokens_per_second", "tokens/s")), strict=True
    ):
        for cache, marker in (("block", "o"), ("sub_block", "s")):
            for mode, colour in (("delta", "#1f77b4"), ("output", "#d62728")):
                mine = [r for r in rows if r["cache"] == cache and r["mode"] == mode]
                if mine:
                    x, y = [r[key] for r in mine], [100 * r["accuracy"] for r in mine]
                    axis.scatter(x, y, marker=marker, color=colour, alpha=0.75, label=f"{cache}, {mode}")
        for r in (r for r in rows if r["name"] == "k=1"):
            axis.axhline(100 * r["accuracy"], color="0.8", zorder=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("exact match, %")
    axes[1].legend(frameon=False)
    with whole.replacing(path) as place:
        figure.savefig(place, dpi=130)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-fast-dllm-v2")
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--limit", type=COUNT, default=500)
    parser.add_argument("--threshold", type=SHARE, default=0.9)
    parser.add_argument("--caches", nargs="+", default=["block", "sub_block"])
    parser.add_argument("--batch-size", type=COUNT, default=16)
    parser.add_argument("--out", type=output_folder, default=Path("results/reuse"))
    args = parser.parse_args()

    model = fastdllm.load(args.model)
    lines = (TASKS_DIR / "gsm_symbolic" / f"{args.split}.jsonl").read_text(encoding="utf-8").splitlines()[: args.limit]
    problems = [json.loads(line) for line in lines]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "study.json"
    done = read_json(path) if path.exists() else {}
    plan = [(cache, setting) for cache in args.caches for setting in settings(model.spec.layers)]
    for cache, setting in tqdm(plan, desc="settings"):
        key = f"{args.model} {args.split} {len(problems)} {args.threshold} {cache} {name(setting)}"
        if key not in done:
            options = {"gen_length": 256, "cache": cache, "threshold": args.threshold, **setting}
            done[key] = {"cache": cache, "name": name(setting), "mode": setting.get("reuse_mode", "delta")}
            done[key] |= measure(model, problems, options, args.batch_size)
            whole.write_text(path, json.dumps(done))
    rows = [done[f"{args.model} {args.split} {len(problems)} {args.threshold} {c} {name(s)}"] for c, s in plan]
    table = [
        "| cache | setting | accuracy | vs k=1, points | layer-token products | forwards | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = next(r for r in rows if r["cache"] == row["cache"] and r["name"] == "k=1")
        low, high = interval(100.0 * (np.array(row["right"], int) - np.array(base["right"], int)))
        row["share"] = row["layer_tokens"] / base["layer_tokens"]
        change = 100 * (row["accuracy"] - base["accuracy"])
        table.append(
            f"| {row['cache']} | {row['name']} | {100 * row['accuracy']:.1f} % | {change:+.1f} [{low:+.1f}, {high:+.1f}] | "
            f"{100 * row['share']:.1f} % | {row['nfe']:.1f} | {row['tokens_per_second']:.0f} |"
        )
    whole.write_text(args.out / "study.md", "\n".join(table) + "\n")
    plot(rows, args.out / "study.png")
    print("\n".join(table))


if __name__ == "__main__":
    with one_line("reuse_study"):
        main()
