# SPDX-License-Identifier: Apache-2.0
"""LLaDA-8B's shape under the published code and under this one, on one device in one run: the data of docs/speed.png.

    git clone https://github.com/NVlabs/Fast-dLLM; pip install einops
    python -m scripts.benchmarks.published --checkout Fast-dLLM --output docs/speed.json
    python -m scripts.studies.figures speed

Both get random bf16 weights, the dual cache, blocks of 32 and four tokens per step. The published code answers one prompt
at a time; this one also answers batches, and with fp8 weights.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdllm import whole
from fastdllm.arguments import COUNT, Parser, output_file
from fastdllm.shell import one_line
from scripts.benchmarks import decode

BLOCK, PER_STEP = 32, 4
# What the published checkpoint's config.json says beyond its sizes.
KIND = {
    "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "weight_tying": False,
    "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0, "rms_norm_eps": 1e-5,
}  # fmt: skip


class Published:
    """The code of a checkout of NVlabs/Fast-dLLM over random weights of LLaDA-8B's shape."""

    def __init__(self, checkout: Path, device: torch.device) -> None:
        folder = checkout.resolve() / "llada"
        if not (folder / "generate.py").is_file() or not (folder / "model" / "modeling_llada.py").is_file():
            raise ValueError(
                f"--checkout {checkout} has no llada/generate.py and model/; give a checkout of NVlabs/Fast-dLLM"
            )
        sys.path.insert(0, str(folder))  # its modules import one another as top-level names
        self.answer: Callable[..., Any] = importlib.import_module("generate").generate_with_dual_cache
        network = importlib.import_module("model.modeling_llada").LLaDAModelLM
        config = importlib.import_module("model.configuration_llada").LLaDAConfig
        sizes = decode.SHAPES["llada"][1]
        self.vocab = sizes["vocab_size"]
        self.mask = decode.SHAPES["llada"][0].spec(sizes, {}).mask_id
        torch.set_default_dtype(torch.bfloat16)
        try:
            self.model = network(config(**{**KIND, **sizes, "mask_token_id": self.mask})).to(device).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        torch.manual_seed(0)
        for name, p in self.model.named_parameters():
            p.data.fill_(1.0) if "norm" in name else p.data.normal_(0.0, 0.02)
        self.model.model.transformer.ff_out.weight.data[self.mask] = 0  # a mask is never the likeliest token
        self.device = device

    def ids(self, n: int) -> torch.Tensor:
        return torch.randint(0, self.vocab - 600, (1, n), device=self.device)

    @torch.no_grad()
    def forwards(self, total: int, repeats: int) -> dict[str, float]:
        """Milliseconds of a forward over the last block, and over all positions."""
        ids, place = self.ids(total), torch.zeros(1, total, dtype=torch.bool, device=self.device)
        place[:, -BLOCK:] = True
        past = self.model(ids, use_cache=True).past_key_values
        block = ids[:, -BLOCK:]
        narrow = decode.median_ms(
            lambda: self.model(block, past_key_values=past, use_cache=True, replace_position=place), self.device, repeats
        )
        whole = decode.median_ms(lambda: self.model(ids, use_cache=True), self.device, max(3, repeats // 4))
        return {f"block of {BLOCK}": narrow, f"{total} positions": whole}

    def tokens_per_second(self, prompt: int, gen: int) -> float:
        ids = self.ids(prompt)
        for _ in range(2):  # the first one warms up
            decode.synchronise(self.device)
            began = time.perf_counter()
            self.answer(self.model, ids, steps=gen // PER_STEP, gen_length=gen, block_length=BLOCK, mask_id=self.mask)
            decode.synchronise(self.device)
            seconds = time.perf_counter() - began
        return gen / seconds


def rounded(value: float) -> float:
    """Three digits, and all digits of a larger number: tokens/s and milliseconds as they are printed."""
    return round(value) if value >= 100 else float(f"{value:.3g}")


def measured(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The fields `forward_ms` and `tokens_per_second` of docs/speed.json."""
    total = args.prompts[0] + args.gen
    theirs = Published(args.checkout, device)
    forward_ms = {"published": theirs.forwards(total, args.repeats)}
    speeds = {f"prompt_{n}": theirs.tokens_per_second(n, args.gen) for n in args.prompts}
    rows: list[dict[str, Any]] = [{"code": "published", "weights": "bf16", "batch": 1, **speeds}]
    del theirs
    for kind in ("bf16", "fp8"):
        model = decode.random_model("llada", device, None if kind == "bf16" else kind)
        if kind == "bf16":
            peak = decode.ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
            found = decode.forwards(model, peak, args.prompts[0], args.gen, args.repeats)
            forward_ms[kind] = {
                f"block of {BLOCK}": found["block_forward_ms"],
                f"{total} positions": found["full_forward_ms"],
            }
        for batch in args.batches:
            speeds = {
                f"prompt_{n}": decode.answers(model, batch, n, args.gen, PER_STEP, {"cache": "dual"})["tokens_per_second"]
                for n in args.prompts
            }
            rows.append({"code": "fastdllm", "weights": kind, "batch": batch, **speeds})
        del model
    rows.sort(key=lambda row: (row["code"] != "published", row["batch"]))
    return {
        "forward_ms": {code: {name: rounded(ms) for name, ms in times.items()} for code, times in forward_ms.items()},
        "tokens_per_second": [
            {name: rounded(value) if name.startswith("prompt_") else value for name, value in row.items()} for row in rows
        ],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of NVlabs/Fast-dLLM")
    parser.add_argument("--output", type=output_file, help="a JSON file whose figures are replaced; default: print only")
    parser.add_argument("--prompts", nargs="+", type=COUNT, default=[1000, 128], help="lengths; forwards have the first")
    parser.add_argument("--batches", nargs="+", type=COUNT, default=[1, 32], help="of this code; default: %(default)s")
    parser.add_argument("--gen", type=COUNT, default=256, help="new tokens, whole blocks of 32; default: %(default)s")
    parser.add_argument("--repeats", type=COUNT, default=40, help="of which the median is taken; default: %(default)s")
    args = parser.parse_args(arguments)
    if args.gen < BLOCK or args.gen % BLOCK:
        parser.error(f"--gen {args.gen} must be a multiple of {BLOCK}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    triton = f", triton {version('triton')}" if find_spec("triton") else ""
    report = {
        "measured": f"{date.today()}, one {name}, torch {torch.__version__}{triton}, commit {decode.commit()}; one run",
        "shape": f"LLaDA-8B, random weights, dual cache, {args.gen} new tokens, {PER_STEP} tokens per step",
        "command": "python -m scripts.benchmarks.published --checkout Fast-dLLM --output docs/speed.json",
        **measured(args, device),
    }
    print(json.dumps(report, indent=1))
    if args.output:
        before = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
        whole.write_text(args.output, json.dumps(before | report, indent=1) + "\n")


if __name__ == "__main__":
    with one_line("published"):
        main()
