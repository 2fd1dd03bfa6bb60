# SPDX-License-Identifier: Apache-2.0
"""Training speed: tokens a second and the share of the device's own matrix rate, next to transformers' causal training.

    python -m scripts.benchmarks.training                     # 1.5B and 7B shapes, random weights, on one and two GPUs
    python -m scripts.benchmarks.training --device cpu --tiny # seconds on a CPU, to see that it runs

`--output docs/training.json` keeps the cases there, from which `python -m scripts.studies.tables` writes the table of
docs/finetuning.md.

One step is forward, backward with recomputed activations, clipping and fused AdamW, all in bfloat16, on full rows. Two
devices shard weights, gradients and optimiser layer by layer (FSDP). Tokens are those of the text: block diffusion runs each
four times, in two views of noisy and clean halves, and its head once. The share counts the matrix products that each
objective needs, recomputation left out, over seconds times the rate of a large square product, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessRaisedException, spawn
from torch.nn.utils import clip_grad_norm_
from transformers import Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from fastdllm import whole
from fastdllm.arguments import COUNT, SIZE, Parser, output_file
from fastdllm.shell import one_line
from fastdllm.training.model import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from fastdllm.training.objective import choose_masked, draw_noise
from scripts.studies.cells import grid
from scripts.studies.speed_tables import TRAINING, training_cells

BLOCK = 32
OBJECTIVES = ("block diffusion", "causal")


@dataclass(frozen=True)
class Shape:
    """A Qwen2 by its sizes, the rows of a step on each device and their tokens."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    rows: int
    tokens: int

    def config(self) -> Fast_dLLM_QwenConfig:
        return Fast_dLLM_QwenConfig(
            bd_size=BLOCK,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=self.tokens,
            tie_word_embeddings=self.tied,
            mask_token_id=self.vocab - 1,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )

    def flops(self, objective: str) -> float:
        """Of the matrix products of one step on one device, forward and backward."""
        head_dim = self.width // self.heads
        projections = self.width * (2 * self.width + 2 * self.kv_heads * head_dim) + 3 * self.width * self.ffn
        # Pairs of query and key: a causal row's half; noisy and clean rows' earlier blocks, and their own.
        pairs = self.tokens * (self.tokens + 1) / 2 if objective == "causal" else self.tokens * (self.tokens + BLOCK)
        positions, copies = (self.tokens, 1) if objective == "causal" else (2 * self.tokens, 2)
        layer = copies * (2 * positions * projections + 4 * self.width * pairs)
        return 3 * self.rows * (self.layers * layer + 2 * self.tokens * self.width * self.vocab)


SHAPES = {
    "1.5B": Shape(28, 1536, 8960, 12, 2, 151936, True, rows=4, tokens=2048),
    "7B": Shape(28, 3584, 18944, 28, 4, 152064, False, rows=2, tokens=2048),
}
TINY = Shape(2, 64, 96, 4, 2, 256, True, rows=2, tokens=64)


def build(shape: Shape, objective: str, device: torch.device) -> nn.Module:
    """A random model on the device, its activations recomputed in the backward pass."""
    cuda = device.type == "cuda"
    kind, attention = Qwen2ForCausalLM, "sdpa"
    if objective != "causal":
        kind, attention = Fast_dLLM_QwenForCausalLM, "flex_attention" if cuda else "sdpa"
    with device:
        config = shape.config()
        model = kind._from_config(config, dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation=attention)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def inputs(shape: Shape, objective: str, device: torch.device) -> dict[str, Tensor]:
    """Full rows of random tokens, all of them targets."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocab - 1, (shape.rows, shape.tokens), generator=generator)
    if objective == "causal":
        batch = {"input_ids": ids, "labels": ids}
    else:
        positions = torch.arange(shape.tokens).expand(shape.rows, -1)
        labels = ids.masked_fill(positions == 0, -100)
        masked = choose_masked(labels, positions, BLOCK, draw_noise(shape.rows, shape.tokens, generator))
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "masked": masked}
        batch["documents"] = torch.zeros_like(positions)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def timed(function: Callable[[], object], device: torch.device, steps: int, warm_up: int) -> float:
    """Median seconds of a call."""
    seconds = []
    for _ in range(warm_up + steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warm_up:])


def matrix_rate(device: torch.device, tiny: bool) -> float:
    """Operations a second of a large square product, in the number format that is trained in."""
    size = 256 if tiny else 8192
    a, b = (
        torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    ).unbind()
    return 2 * size**3 / timed(lambda: a @ b, device, 20, 5)


def one_device(rank: int, world: int, port: int, shape: Shape, objective: str, args: argparse.Namespace, out: Path) -> None:
    """One process of a case; the first writes seconds a step, the matrix rate and the peak memory."""
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    rate = matrix_rate(device, args.tiny)
    model = build(shape, objective, device)
    if world > 1:
        mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
        for module in model.modules():
            if isinstance(module, Qwen2DecoderLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    batch = inputs(shape, objective, device)

    def step() -> None:
        model(**batch).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    seconds = timed(step, device, args.steps, args.warm_up)
    if rank == 0:
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        whole.write_text(out, f"{seconds} {rate} {peak}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(shape: Shape, objective: str, world: int, args: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds a step, matrix rate and peak memory of a case, in processes of its own that give their memory back."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result"
        spawn(one_device, (world, free_port(), shape, objective, args, out), nprocs=world)
        seconds, rate, peak = map(float, out.read_text(encoding="utf-8").split())
    return seconds, rate, peak


def measured(shape: Shape, objective: str, world: int, args: argparse.Namespace) -> dict[str, Any]:
    """One case: what was run, and its figures, or `why` it has none."""
    case: dict[str, Any] = {"objective": objective, "devices": world, "rows": shape.rows, "tokens": shape.tokens}
    try:
        seconds, rate, peak = run(shape, objective, world, args)
    except ProcessRaisedException as error:
        return case | {"why": "out of memory" if "OutOfMemoryError" in str(error) else str(error).strip().splitlines()[-1]}
    case |= {"step_ms": round(1e3 * seconds, 1), "tokens_per_second": round(world * shape.rows * shape.tokens / seconds)}
    case["share_of_matrix_rate"] = round(shape.flops(objective) / (seconds * rate), 3)
    return case | ({"peak_gib": round(peak / 2**30, 1)} if peak else {})


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--devices", type=COUNT, nargs="+", help="how many to use; default: 1, and 2 where there are two")
    parser.add_argument("--rows", type=COUNT, help="rows a step on each device")
    parser.add_argument("--tokens", type=COUNT, help="tokens a row, a multiple of 32")
    parser.add_argument("--steps", type=COUNT, default=8)
    parser.add_argument("--warm_up", type=SIZE, default=3)
    parser.add_argument("--tiny", action="store_true", help="a network of no use, to see that everything runs")
    parser.add_argument("--output", type=output_file, help="a JSON file for the cases, of which it then holds no others")
    args = parser.parse_args(argv)
    present = torch.cuda.device_count() if args.device == "cuda" else os.cpu_count() or 1
    devices = args.devices or [n for n in (1, 2) if n <= present]
    if min(devices) < 1 or (max(devices) > present and args.device == "cuda"):
        parser.error(f"--devices {devices}: {present} are there")
    if args.tokens is not None and (args.tokens < BLOCK or args.tokens % BLOCK):
        parser.error(f"--tokens {args.tokens} must be a positive multiple of {BLOCK}")
    shapes = {"tiny": TINY} if args.tiny else {name: SHAPES[name] for name in args.shapes}
    changes = {name: value for name in ("rows", "tokens") if (value := getattr(args, name)) is not None}
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    cases: list[dict[str, Any]] = []
    report = {
        "measured": f"{name}, {versions}, median of {args.steps} steps",
        "command": f"python -m scripts.benchmarks.training --steps {args.steps} --output docs/training.json",
        "cases": cases,
    }
    print(f"{report['measured']}\n\n{grid(TRAINING, [])}", flush=True)
    for label, given in shapes.items():
        shape = replace(given, **changes)
        for world in devices:
            for objective in OBJECTIVES:
                cases.append({"shape": label} | measured(shape, objective, world, args))
                print(f"| {' | '.join(training_cells(cases[-1]))} |", flush=True)
                if args.output:  # also what was measured before a run that is cut short
                    whole.write_text(args.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    with one_line("training"):
        main()
