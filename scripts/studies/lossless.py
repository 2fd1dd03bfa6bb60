# SPDX-License-Identifier: Apache-2.0
"""The option `lossless`: forwards, seconds and identical answers against the same decoder by itself.

    python -m scripts.studies.lossless --models tiny-llada tiny-dream tiny-fast-dllm-v2 --out results/lossless.jsonl

A line of JSON for each model, setting and number of branches; lines that are there already are not measured again. The
table on standard output says how many times fewer the forwards are, and how many times less an answer would take where a
forward of n rows takes as long as `--milliseconds` says (default: a block of 32 of LLaDA-8B's shape in bf16 on an H100).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fastdllm
from fastdllm.arguments import COUNT, Parser
from fastdllm.drafts import milliseconds
from fastdllm.generation import Output
from fastdllm.models import Model
from fastdllm.shell import one_line
from fastdllm.tasks import TASKS_DIR
from scripts.results import read_lines
from scripts.studies.pareto import parse

H100 = {1: 6.33, 2: 6.85, 4: 7.56, 8: 9.88}


@dataclass(frozen=True)
class Line:
    """identical: answers with the tokens of the decoder by itself. forwards: of an answer, on average. seconds: of all."""

    model: str
    setting: str
    branches: int
    answers: int
    identical: int
    forwards: float
    positions: float
    seconds: float
    measured: str


NAMES: dict[str, Any] = dict.fromkeys(("forwards", "positions", "seconds"), (int, float))
NAMES |= dict.fromkeys(("model", "setting", "measured"), str) | dict.fromkeys(("branches", "answers", "identical"), int)
FIELDS = {field.name: NAMES[field.name] for field in fields(Line)}


def by_rows(text: str) -> dict[int, float]:
    """Milliseconds of a forward by its rows, as JSON."""
    try:
        cost = {int(rows): float(ms) for rows, ms in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        cost = {}
    if not cost or min(cost) < 1 or not all(0 < ms < 1e9 for ms in cost.values()):
        raise argparse.ArgumentTypeError(f'must be milliseconds by rows such as {{"1": 6.3, "2": 6.9}}, not {text[:60]!r}')
    return cost


def questions(limit: int) -> list[Any]:
    lines = (TASKS_DIR / "gsm_symbolic" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    return [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]


def answer(model: Model, setting: str, branches: int, args: argparse.Namespace) -> tuple[Output, float]:
    own = parse(setting if "+" in setting else f"{setting}+{model.spec.defaults.get('cache', 'dual')}")
    started = time.perf_counter()
    given = questions(args.limit)
    out = fastdllm.generate(
        model, given, gen_length=256, batch_size=args.batch_size, lossless=branches, progress=True, **own
    )
    return out, time.perf_counter() - started


def measure(name: str, setting: str, args: argparse.Namespace) -> list[Line]:
    model = fastdllm.load(name, device=args.device, dtype="float32")
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    lines: list[Line] = []
    alone: list[Any] = []
    for branches in (1, *args.branches):
        out, seconds = answer(model, setting, branches, args)
        texts, n = [s.tolist() for s in out.sequences], len(out.sequences)
        alone = alone or texts
        lines.append(
            Line(
                model=name, setting=setting, branches=branches, answers=n,
                identical=sum(a == b for a, b in zip(texts, alone, strict=True)),
                forwards=round(sum(out.stats.row_forwards) / n, 2), positions=round(sum(out.stats.row_positions) / n),
                seconds=round(seconds, 1), measured=f"{date.today()}, torch {torch.__version__}, {device}",
            )
        )  # fmt: skip
    return lines


def table(lines: list[Line], cost: dict[int, float]) -> str:
    """Markdown."""
    rows = ["| model | setting | branches | forwards | fewer | identical | at batch 1 |", "| --- " * 7 + "|"]
    alone = {(line.model, line.setting): line.forwards for line in lines if line.branches == 1}
    for line in lines:
        fewer = alone[line.model, line.setting] / line.forwards
        faster = fewer * cost[min(cost)] / milliseconds(cost, line.branches)
        rows.append(
            f"| {line.model} | `{line.setting}` | {line.branches} | {line.forwards:.1f} | {fewer:.2f} x "
            f"| {line.identical} of {line.answers} | {faster:.2f} x |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-llada"])
    parser.add_argument("--settings", nargs="+", default=["quota", "threshold=0.95"])
    parser.add_argument("--branches", nargs="+", type=COUNT, default=[4, 8, 16])
    parser.add_argument("--limit", type=COUNT, default=100, help="validation problems of gsm_symbolic")
    parser.add_argument("--batch_size", type=COUNT, default=16)
    parser.add_argument("--device")
    parser.add_argument("--milliseconds", type=by_rows, default=H100, help='of a forward by rows: {"1": 6.3, "2": 6.9}')
    parser.add_argument("--out", type=Path, default=Path("results/lossless.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [Line(**line) for line in read_lines(args.out, FIELDS)]
    args.out.open("a").close()  # a place that cannot be written to shows before anything is computed
    done = {(line.model, line.setting) for line in lines}
    for model in args.models:
        for setting in args.settings:
            if (model, setting) not in done:
                new = measure(model, setting, args)
                lines += new
                with args.out.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(line)) + "\n" for line in new)
    print(table(lines, args.milliseconds))


if __name__ == "__main__":
    with one_line("lossless"):
        main()
