# SPDX-License-Identifier: Apache-2.0
"""What prompts that begin alike save: an evaluation's prompts with and without the prompt cache, in one run.

    python -m scripts.benchmarks.shared_prompts                     # Fast-dLLM v2 7B's shape with random weights, on a GPU
    python -m scripts.benchmarks.shared_prompts --model tiny-fast-dllm-v2 --device cpu --shots 1 --requests 16 --gen 64

Each prompt is a problem of GSM-Symbolic after the same `--shots` worked examples, as lm-eval builds them. Every setting runs
twice, and the second time counts. `prompt` answers with a single forward after the prompt, so that almost all of its time is
the prompt's; `answer` writes `--gen` tokens. positions: those of the prompts that were computed.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from typing import Any

import torch

import fastdllm
from fastdllm import DecodeConfig, whole
from fastdllm.arguments import COUNT, SIZE, Parser, output_file
from fastdllm.models import Model
from fastdllm.shell import one_line
from fastdllm.tasks import TASKS_DIR
from scripts.benchmarks.decode import commit, random_model, usable

TASK = TASKS_DIR / "gsm_symbolic"


def prompts(tokenizer: Any, count: int, shots: int, vocab: int) -> list[list[int]]:
    """Token ids of `count` problems of the test split, each after the first `shots` of the validation split."""
    test, examples = (
        [json.loads(line) for line in (TASK / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("test", "validation")
    )
    head = "".join(f"Question: {p['question']}\nAnswer: {p['answer']}\n\n" for p in examples[:shots])
    texts = [f"{head}Question: {test[i % len(test)]['question']}\nAnswer:" for i in range(count)]
    return [[token % vocab for token in tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]


def measured(model: Model, asked: list[list[int]], batch: int, gen: int, kept: int | None) -> dict[str, Any]:
    """Seconds of both runs and computed positions of the prompts; kept: `prompt_cache`, 0 for none."""
    size = model.spec.block_causal
    fixed = {"decoder": "quota", "stop_ids": (), "prompt_cache": kept, "batch_size": batch}
    found: dict[str, Any] = {}
    once = {"gen_length": size, "steps": 1, "small_block_size": size}  # one forward writes all
    for name, config in (("prompt", once), ("answer", {"gen_length": gen, "steps": round(3 * gen / 8)})):
        for _ in range(2):
            stats = fastdllm.generate(model, asked, DecodeConfig(**config, **fixed)).stats
        found[name] = stats.seconds
        found["positions"] = sum(map(len, asked)) - sum(stats.row_cached)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a block-causal model that load takes; default v2's 7B shape with random weights")
    parser.add_argument("--device", default="cuda", help="cpu, cuda, ... (default cuda)")
    parser.add_argument("--requests", type=COUNT, default=128, help="prompts (default 128)")
    parser.add_argument("--shots", type=SIZE, default=5, help="worked examples before each problem (default 5)")
    parser.add_argument("--batch", type=COUNT, default=32, help="prompts at a time (default 32)")
    parser.add_argument("--gen", type=COUNT, default=256, help="tokens of a whole answer (default 256)")
    parser.add_argument(
        "--output", type=output_file, help="also write the figures to this file, docs/shared_prompts.json for one"
    )
    args = parser.parse_args(arguments)
    device = usable(args.device)
    model = fastdllm.load(args.model, device=device) if args.model else random_model("v2", device, None)
    if not model.spec.block_causal:
        raise ValueError(f"{args.model} is bidirectional: its prompts share nothing (docs/how_it_works.md)")
    tokenizer = model.tokenizer or fastdllm.load("tiny-fast-dllm-v2", "cpu").tokenizer
    asked = prompts(tokenizer, args.requests, args.shots, model.spec.vocab)
    report = {
        "command": "python -m scripts.benchmarks.shared_prompts", "date": str(date.today()), "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__, "model": model.name, "requests": args.requests, "shots": args.shots,
        "batch": args.batch, "gen": args.gen, "prompt_tokens": sum(map(len, asked)),
    }  # fmt: skip
    for name, kept in (("without", 0), ("with", None)):
        report[name] = measured(model, asked, args.batch, args.gen, kept)
        print(name, json.dumps(report[name]), flush=True)
    print(json.dumps(report))
    if args.output:
        whole.write_text(args.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    with one_line("shared_prompts"):
        main()
