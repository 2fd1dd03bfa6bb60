# SPDX-License-Identifier: Apache-2.0
"""What weights in fewer bits cost in fidelity: fp8, int8 and int4 against bf16 on the same problems.
The yardstick is bf16 against fp32.

    python -m scripts.studies.quantize_study                         # three tiny models, 500 held-out problems, two decoders
    python -m scripts.studies.quantize_study --models tiny-llada --limit 200 --logit_limit 100 --settings threshold=0.9

Logits: one full forward of prompt + reference answer with a random half of the answer masked, read at the masked positions
over the ids that may be predicted. Error ||l_q - l|| / ||l - mean of l over the ids||, squares summed over all positions;
share of positions with the same most likely token; mean KL(p || p_q) in nats. Accuracy: each decoder with the family's
default cache; the difference has a paired bootstrap interval, `same` is the share of answers that are the same tokens.
Prints a table, then one JSON line. On a CPU the fp8 product is emulated: rounded as on a GPU, but slow.
"""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fastdllm
from fastdllm.arguments import COUNT, Parser
from fastdllm.conversations import encode_text
from fastdllm.forward import Window
from fastdllm.likelihood import Probe
from fastdllm.models import Model
from fastdllm.prompts import encode
from fastdllm.shell import one_line
from scripts.studies.paired import summarise
from scripts.studies.pareto import TASKS, Job, Study, decoded, problems, prompt, reference_of

TASK, TEMPLATE = "gsm_symbolic", "chat"
WEIGHTS = {
    "fp32": ("float32", None),
    "bf16": ("bfloat16", None),
    "fp8": ("bfloat16", "fp8"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
AGAINST = {"bf16": "fp32", "fp8": "bf16", "int8": "bf16", "int4": "bf16"}
SHOWN = ("accuracy", "difference", "low", "high", "p", "same", "tokens_differ", "forwards")


def half_masked(model: Model, asked: list[dict[str, str]]) -> list[Probe]:
    """Prompt and reference answer with a random half of the answer masked; the problem's number is the seed."""
    found = []
    for i, problem in enumerate(asked):
        before = encode(model, [prompt(problem["question"], TEMPLATE)])[0]
        answer = torch.tensor(encode_text(model, problem["answer"]))
        order = torch.randperm(len(answer), generator=torch.Generator().manual_seed(i))
        at, ids = len(before) + order[: (len(answer) + 1) // 2].sort().values, torch.cat([before, answer])
        found.append(Probe(ids.index_fill(0, at, model.spec.mask_id), len(before), at, ids[at]))
    return found


@torch.inference_mode()
def logits_of(model: Model, probe: Probe) -> Tensor:
    """[n, V] fp32: what one full forward says of the masked positions."""
    spec, device, length = model.spec, model.device, len(probe.ids)
    block, pos = spec.block_causal or length, torch.arange(length, device=device)[None]
    limit = ((pos // block + 1) * block).clamp(max=length)
    window = Window(torch.zeros(1, dtype=torch.long, device=device), pos, limit, length, dense=not spec.block_causal)
    hidden = model.network(probe.ids[None].to(device), window, model.network.new_store(1, length))
    return model.network.logits(hidden[0, (probe.at - spec.shift).to(device)]).float()


def errors(pairs: list[tuple[Tensor, Tensor]], banned: Tensor) -> dict[str, float]:
    """Of (logits, the reference's logits) [n, V] of every canvas, without the ids that are banned [V]."""
    other, reference = (torch.cat(x)[:, ~banned].double() for x in zip(*pairs, strict=True))
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return {
        "positions": len(reference),
        "error": float((other - reference).norm() / (reference - reference.mean(-1, keepdim=True)).norm()),
        "same_top": float((other.argmax(-1) == reference.argmax(-1)).double().mean()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
    }


def logit_errors(models: dict[str, Model], asked: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Weights -> their errors against their reference in AGAINST."""
    one = next(iter(models.values()))
    found: dict[str, list[Tensor]] = {weights: [] for weights in models}
    for probe in tqdm(half_masked(one, asked), desc=f"{one.name}: logits", unit="problem"):
        for weights, model in models.items():
            found[weights].append(logits_of(model, probe))
    return {w: errors(list(zip(found[w], found[ref], strict=True)), one.banned) for w, ref in AGAINST.items()}


def accuracies(models: dict[str, Model], name: str, setting: str, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Weights -> accuracy and how it compares with that of their reference, on the same problems."""
    study, size = Study(name, TEMPLATE, args.split, WEIGHTS["bf16"][0]), 2 * args.batch_size
    count = len(problems(args.split, args.limit, TASKS[TASK].folder))
    lines: dict[str, list[dict[str, Any]]] = {weights: [] for weights in models}
    with tqdm(total=count * len(models), unit="problem") as bar:
        for weights, model in models.items():
            bar.set_description(f"{name}: {setting}, {weights}")
            for i in range(0, count, size):
                job = Job(study, setting, tuple(range(i, min(i + size, count))), False, args)
                lines[weights] += [{**line, "setting": weights} for line in decoded(job, model)]
                bar.update(len(job.chosen))
    rows = {w: summarise({w: lines[w], ref: lines[ref]}, ref, {}) for w, ref in AGAINST.items()}
    return {w: {key: r[key] for key in SHOWN} for w, both in rows.items() for r in both if r["setting"] == w}


def markdown(found: list[dict[str, Any]]) -> str:
    decoders = list(found[0]["decoding"])
    head = ["model", "weights", "against", "logit error, %", "same top token, %", "KL, nats"]
    head += [f"`{d}`: {what}" for d in decoders for what in ("accuracy, %", "difference (95 %)", "same, %")]
    table = [head, ["---"] * len(head)]
    for row in found:
        logits, cells = row["logits"], [row["model"], row["weights"], row["against"]]
        cells += [f"{100 * logits['error']:.2f}", f"{100 * logits['same_top']:.2f}", f"{logits['kl']:.1e}"]
        for r in row["decoding"].values():
            change = f"{100 * r['difference']:+.1f} ({100 * r['low']:+.1f}, {100 * r['high']:+.1f})"
            cells += [f"{100 * r['accuracy']:.1f}", change, f"{100 * r['same']:.1f}"]
        table.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-llada", "tiny-dream", "tiny-fast-dllm-v2"])
    parser.add_argument("--settings", nargs="*", default=["threshold=0.9", "quota"])
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--limit", type=COUNT, default=500, help="problems decoded")
    parser.add_argument("--logit_limit", type=COUNT, default=100)
    parser.add_argument("--gen_length", type=COUNT, default=256)
    parser.add_argument("--block_length", type=COUNT, default=32)
    parser.add_argument("--batch_size", type=COUNT, default=16)
    parser.add_argument("--device")
    parser.set_defaults(task=TASK, runner=None)
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for name in args.models:
        models = {w: fastdllm.load(name, args.device, dtype, quantize=kind) for w, (dtype, kind) in WEIGHTS.items()}
        logits = logit_errors(models, problems(args.split, args.logit_limit, TASKS[TASK].folder))
        cache = reference_of(name, TASK).partition("+")[2]
        decoding = {d: accuracies(models, name, f"{d}+{cache}", args) for d in args.settings}
        for w, ref in AGAINST.items():
            of = {d: found[w] for d, found in decoding.items()}
            rows.append({"model": name, "weights": w, "against": ref, "logits": logits[w], "decoding": of})
    device = models["bf16"].device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"\n{markdown(rows)}")
    print(json.dumps({"device": machine, "torch": torch.__version__, "arguments": vars(args), "rows": rows}))


if __name__ == "__main__":
    with one_line("quantize_study"):
        main()
