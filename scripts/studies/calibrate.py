# SPDX-License-Identifier: Apache-2.0
"""Which drafts of the option `lossless` come true, measured on a model and written next to its weights as drafts.json.

    python -m scripts.studies.calibrate --model tiny-llada
    python -m scripts.studies.calibrate --model tiny-llada --settings quota threshold=0.95 --limit 50
    python -m scripts.studies.calibrate --model GSAI-ML/LLaDA-8B-Instruct --out drafts.json --costs
    python -m scripts.studies.calibrate --model tiny-llada --settings --costs        # the costs only, the drafts as they are

A draft is named by the ranks of its tokens in the scores that it is made from, so one run of each decoder by itself says
which drafts would have come true. They are taken one after the other, each time the one that saves most steps in
addition to those before it. `forwards` is what an answer takes then with 1, 2, 3, ... branches. `--costs` also times a
forward of one block over several rows on this device, from which `lossless=0` chooses how many branches pay.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import torch
from torch import Tensor

import fastdllm
from fastdllm import whole
from fastdllm.arguments import COUNT, Parser, output_file
from fastdllm.build import assemble, device_name
from fastdllm.decoders.base import DecoderRule
from fastdllm.drafts import FILE, Draft, Graph
from fastdllm.forward import Window
from fastdllm.models import Model, find_folder
from fastdllm.shell import one_line
from fastdllm.tasks import TASKS_DIR
from fastdllm.view import View
from scripts.results import read_json
from scripts.studies.pareto import parse

ROWS = (1, 2, 4, 8, 16)  # of one forward, whose time is measured
PROMPT = 1000  # keys before the block of such a forward, as far as the model's context allows


@dataclass(frozen=True)
class Scored:
    """A step of one row: what was open, the tokens and confidences there."""

    ids: Tensor
    masked: Tensor
    top: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Watched(DecoderRule):
    """`inner`, and a list of what it saw: for each block of each request its steps."""

    inner: DecoderRule
    blocks: list[list[Scored]] = field(default_factory=list, compare=False)
    current: dict[int, list[Scored]] = field(default_factory=dict, compare=False)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs

    def step(self, view: View) -> Tensor:
        if view.slot is not None:
            for i, (slot, step) in enumerate(zip(view.slot.tolist(), view.step.tolist(), strict=True)):
                if step == 0:
                    self.current[slot] = []
                    self.blocks.append(self.current[slot])
                row = Scored(view.ids[i].clone(), view.ids[i] == view.mask_id, view.top[i].clone(), view.scores()[i])
                self.current[slot].append(row)
        return self.inner.step(view)


def lines_of(block: Sequence[Scored]) -> list[list[Draft]]:
    """For every content of a block that a forward found, but the first: the drafts, made from the scores before it, that the
    steps from there on make come true, in order and as far as any would."""
    return [line_of(block[i - 1], block[i:]) for i in range(1, len(block))]


def line_of(before: Scored, steps: Sequence[Scored]) -> list[Draft]:
    """The same from one content, steps[0]."""
    scores = before.scores.masked_fill(~steps[0].masked, -torch.inf)
    rank = scores.argsort(descending=True, stable=True).argsort()
    line: list[Draft] = []
    for later in steps[1:]:
        new = steps[0].masked & ~later.masked
        if scores[new].isneginf().any() or (later.ids[new] != before.top[new]).any():
            break
        line.append(tuple(sorted(rank[new].tolist())))
    return line


def taken(line: Sequence[Draft], drafts: set[Draft]) -> int:
    """How many drafts of a line come true one after the other."""
    return next((n for n, draft in enumerate(line) if draft not in drafts), len(line))


def best_drafts(blocks: Sequence[Sequence[list[Draft]]], count: int) -> Graph:
    """The drafts that save most steps, greedily; none that came true once only."""
    found: list[Draft] = []
    lines = [line for block in blocks for line in block if line]
    for _ in range(count):
        gain: Counter[Draft] = Counter()
        for line in lines:
            n = taken(line, set(found))
            if n < len(line):
                gain[line[n]] += 1 + taken(line[n + 1 :], set(found))
        if max(gain.values(), default=0) < 2:
            break
        found.append(gain.most_common(1)[0][0])
    return tuple(found)


def forwards(blocks: Sequence[Sequence[list[Draft]]], drafts: Graph) -> int:
    """Forwards of all blocks with these drafts. The one that opens a block has none."""
    total = 0
    for block in blocks:
        total, at = total + 1, 0
        while at < len(block):
            total, at = total + 1, at + 1 + taken(block[at], set(drafts))
    return total


def costs(model: Model, block: int, repeats: int = 20) -> dict[str, float]:
    """Milliseconds of a forward over a block of 1, 2, ... rows; the median of some."""
    spec, device = model.spec, model.device
    length = min(PROMPT, spec.max_length - block) + block
    out = {}
    for rows in ROWS:
        store = model.network.new_store(rows, length)
        pos = torch.arange(length - block, length, device=device).expand(rows, -1)
        window = Window(torch.arange(rows, device=device), pos, torch.full_like(pos, length), length, dense=True)
        ids = torch.full_like(pos, spec.mask_id)
        seconds = []
        with torch.inference_mode():
            for _ in range(repeats):
                started = time.perf_counter()
                hidden = model.network(ids, window, store)
                model.network.confidence(hidden.flatten(0, 1), model.banned, entropy=False, margin=False).top.sum().item()
                seconds.append(time.perf_counter() - started)
        out[str(rows)] = round(1000 * sorted(seconds)[repeats // 2], 3)
    return out


def measure(model: Model, setting: str, questions: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """What one decoder says of its drafts."""
    own = parse(setting if "+" in setting else f"{setting}+{model.spec.defaults.get('cache', 'dual')}")
    config = fastdllm.DecodeConfig(gen_length=args.gen_length, **own)
    watched = Watched(assemble(model, config).decoder)
    fastdllm.generate(
        model, questions, decoder=watched, cache=own["cache"], gen_length=args.gen_length, batch_size=args.batch_size,
        runner="eager", progress=True,
    )  # fmt: skip
    blocks = [lines_of(block) for block in watched.blocks]
    drafts = best_drafts(blocks, args.branches - 1)
    each = [round(forwards(blocks, drafts[:n]) / len(questions), 2) for n in range(len(drafts) + 1)]
    print(f"{setting}: " + "  ".join(f"{n}: {f} ({each[0] / f:.2f} x)" for n, f in enumerate(each, 1)), flush=True)
    return {"setting": setting, "drafts": drafts, "forwards": each}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--settings", nargs="*", default=["quota", "threshold=0.95"], help="without a value none")
    parser.add_argument("--limit", type=COUNT, default=50, help="validation problems of gsm_symbolic")
    parser.add_argument("--branches", type=COUNT, default=16)
    parser.add_argument("--gen_length", type=COUNT, default=256)
    parser.add_argument("--batch_size", type=COUNT, default=16)
    parser.add_argument("--costs", action="store_true", help="time a forward on this device too")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=output_file, help=f"default {FILE} in the model's folder")
    args = parser.parse_args(arguments)
    model = fastdllm.load(args.model, device=args.device, dtype=args.dtype)
    out = args.out or find_folder(args.model) / FILE
    file = read_json(out) if out.is_file() else {"decoders": {}}
    lines = (TASKS_DIR / "gsm_symbolic" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[: args.limit]
    questions = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]
    for setting in args.settings:
        name = setting.partition("=")[0].partition("+")[0]
        file["decoders"][name] = measure(model, setting, questions, args)
    if args.costs:
        block = assemble(model, fastdllm.DecodeConfig()).block_length
        file.setdefault("milliseconds", {})[device_name(model.device)] = costs(model, block)
    if args.settings:
        on = f"{device_name(model.device)}, {platform.python_implementation()} torch {torch.__version__}, {model.dtype}"
        file["measured"] = f"{date.today()}, {args.limit} problems, {on}"
    whole.write_text(out, written(file))
    print(out)


def written(file: dict[str, Any]) -> str:
    """JSON with a line for each decoder and each device."""
    lines = []
    for key, value in file.items():
        inner = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()] if isinstance(value, dict) else []
        text = "{\n" + ",\n".join(inner) + "\n }" if inner else json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    with one_line("calibrate"):
        main()
