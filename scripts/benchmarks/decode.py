# SPDX-License-Identifier: Apache-2.0
"""How close a decode step comes to the hardware: floors, forwards, steps, whole answers and batches, in one run.

    python -m scripts.benchmarks.decode                          # published shapes, random bf16 weights made on the device
    python -m scripts.benchmarks.decode --models llada --quantize fp8 --batches 1 32
    python -m scripts.benchmarks.decode --models v2 --set cache=block --set cache=block,reuse_k=2,layer_subset=first
    python -m scripts.benchmarks.decode --models sdar_8b llada2_moe --brief  # a row for each shape, in some 15 seconds each
    python -m scripts.benchmarks.decode --folder /path/to/checkpoint
    python -m scripts.benchmarks.decode --cpu                    # the shipped tiny models

The floor of a block forward is the time to read its weights and keys once at the copy bandwidth measured in the same run,
of a layer's experts only those that its positions choose. That of a full forward is its matrix products at the matrix rate
measured in the same run. Each figure is printed when it has been measured, and one JSON line at the end. `--output
docs/decode.json` also keeps it there, under the kind of weights: the data of the tables in docs/performance.md. `--compare
FILE` (an earlier run's line) adds ratios. On a GPU the kernels are checked against their references first. On a CPU fewer
and smaller runs are the default: two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

import fastdllm
from fastdllm import whole
from fastdllm.arguments import COUNT, Parser, output_file
from fastdllm.build import assemble
from fastdllm.engine import Request, decode
from fastdllm.forward import Window
from fastdllm.models import Family, Model, read_device
from fastdllm.models.a2d import FAMILY as A2D
from fastdllm.models.dream import FAMILY as DREAM
from fastdllm.models.fast_dllm_v2 import FAMILY as V2
from fastdllm.models.llada import FAMILY as LLADA
from fastdllm.models.llada2_moe import FAMILY as LLADA2_MOE
from fastdllm.models.llada_moe import FAMILY as LLADA_MOE
from fastdllm.models.nemotron import FAMILY as NEMOTRON
from fastdllm.models.quantize import KINDS, quantize
from fastdllm.models.sdar import FAMILY as SDAR
from fastdllm.models.spec import ModelSpec
from fastdllm.models.stable_diffcoder import FAMILY as STABLE_DIFFCODER
from fastdllm.models.transformer import Transformer
from fastdllm.runners import cuda_graph, eager
from fastdllm.runners.base import Runner
from fastdllm.runners.cuda_graph import CAPTURED_POSITIONS
from fastdllm.shell import one_line

# config.json of LLaDA-8B-Instruct, Dream-v0-Instruct-7B and Fast_dLLM_v2_7B: the fields that shape the network.
LLADA_8B = {
    "n_layers": 32, "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
    "embedding_size": 126464, "max_sequence_length": 4096, "rope_theta": 500000.0,
}  # fmt: skip
QWEN2_7B = {
    "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "eos_token_id": 151645,
}  # fmt: skip
# Nemotron-Labs-Diffusion-8B's, within the context it was trained with before YaRN.
NEMOTRON_8B = {
    "num_hidden_layers": 34, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 131072, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "eos_token_id": 11,
}  # fmt: skip
# The 3B's, from public copies of its config.json: the layers of Ministral-3-3B, but with a head of its own.
NEMOTRON_3B = NEMOTRON_8B | {"num_hidden_layers": 26, "hidden_size": 3072, "intermediate_size": 9216}
# SDAR-8B-Chat's, which TraDo-8B has too; SDAR-4B-Chat's and TraDo-4B's; A2D's Qwen3-0.6B.
QWEN3_8B = {
    "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "eos_token_id": 151643,
}  # fmt: skip
QWEN3_4B = QWEN3_8B | {"hidden_size": 2560, "intermediate_size": 9728}
QWEN3_06B = QWEN3_8B | {
    "model_type": "a2d-qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16,
    "intermediate_size": 3072, "tie_word_embeddings": True,
}  # fmt: skip
# Of Stable-DiffCoder-8B, LLaDA-MoE-7B-A1B and LLaDA2.1-mini as in tests/models/test_supported.py.
DIFFCODER_8B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 155136, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0, "eos_token_id": 2,
}  # fmt: skip
MOE_7B = {
    "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "expert_intermediate_size": 1024, "qk_layernorm": True, "vocab_size": 157184,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "eos_token_id": 156892,
}  # fmt: skip
MOE2_16B = {
    "num_hidden_layers": 20, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 5120, "first_k_dense_replace": 1, "num_experts": 256, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "num_shared_experts": 1, "moe_intermediate_size": 512, "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5, "vocab_size": 157184, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 600000.0, "pad_token_id": 156892,
}  # fmt: skip
SHAPES: dict[str, tuple[Family, dict[str, Any]]] = {
    "llada": (LLADA, LLADA_8B),
    "dream": (DREAM, QWEN2_7B),
    "v2": (V2, QWEN2_7B),
    "sdar_4b": (SDAR, QWEN3_4B),
    "sdar_8b": (SDAR, QWEN3_8B),
    "a2d": (A2D, QWEN3_06B),
    "stable_diffcoder": (STABLE_DIFFCODER, DIFFCODER_8B),
    "nemotron_3b": (NEMOTRON, NEMOTRON_3B),
    "nemotron": (NEMOTRON, NEMOTRON_8B),
    "llada_moe": (LLADA_MOE, MOE_7B),
    "llada2_moe": (LLADA2_MOE, MOE2_16B),
}
TINY = {"llada": "tiny-llada", "dream": "tiny-dream", "v2": "tiny-fast-dllm-v2"}
# What a run measures if the command line does not say: on a GPU, and on a CPU.
GPU_RUN = {"batches": [1, 4, 16, 32, 64], "prompts": [1000, 128], "gen": 256, "repeats": 40}
BRIEF_RUN = {"batches": [1, 32], "prompts": [128], "gen": 128, "repeats": 10}
CPU_RUN = {"batches": [1, 4], "prompts": [128], "gen": 64, "repeats": 10}


def random_model(name: str, device: torch.device, kind: str | None) -> Model:
    """The published shape with random bf16 weights, made on the device."""
    family, config = SHAPES[name]
    spec = family.spec(config, {})
    network = Transformer(spec, torch.bfloat16, "meta").to_empty(device=device)
    torch.manual_seed(0)
    for key, p in network.named_parameters():
        p.data.fill_(1.0) if key.endswith("norm") else p.data.normal_(0.0, 0.02)
    network.requires_grad_(False).eval()
    if kind:
        quantize(network, kind)
    return Model(network, spec, None, f"{name} (random)")


def usable(name: str) -> torch.device:
    """The device of this name. Raises ValueError for one that is not here."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("a GPU is needed, and torch finds none; some benchmarks take --cpu, others --device cpu")
    return read_device(name)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median milliseconds of one call, by device events on CUDA and the host clock elsewhere."""
    run()
    synchronise(device)
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Copy bandwidth in GB/s (bytes read plus written) and matrix rate in TFLOP/s, on random data."""
    big = device.type == "cuda"
    a = torch.empty(2**31 if big else 2**26, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    copy = median_ms(lambda: b.copy_(a), device, 20)
    n = 8192 if big else 1024
    x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matmul = median_ms(lambda: x @ y, device, 10)
    return {"copy_gb_s": 2 * a.numel() / copy / 1e6, "matmul_tflop_s": 2 * n**3 / matmul / 1e9}


def weight_bytes(network: Transformer, positions: int) -> int:
    """Bytes of weights that a forward over so many positions reads: everything but the embedding table (a tied head reads it
    whole), and of a layer's experts as many as so many positions choose if each chooses at random."""
    tied = network.spec.tied_head
    total = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    e = network.spec.experts
    for name, module in network.named_modules() if e else ():
        layer = int(name.split(".")[1]) if name.endswith(("gate_up", "down")) else -1
        if e and layer >= e.dense:
            size = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
            idle = (1 - e.active / e.count) ** positions  # the share of the experts that nobody chooses
            total -= round(size * idle * e.count * e.inner / network.spec.inner(layer))
    return total if tied else total - network.embed.weight.nbytes


def full_flops(spec: ModelSpec, tokens: int, head_rows: int) -> float:
    """Multiply-adds times two of a forward over `tokens` positions that all see each other."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    linear = spec.width * (q + 2 * kv) + q * spec.width
    attention = 2 * tokens * q
    ffn = sum(3 * spec.width * spec.working(i) for i in range(spec.layers))
    return 2.0 * tokens * (spec.layers * (linear + attention) + ffn) + 2.0 * head_rows * spec.width * spec.vocab


class Forward:
    """A forward of the network and its head over a window, captured on CUDA where the runner would capture it."""

    def __init__(self, model: Model, rows: int, width: int, keys: int, start: int, head_rows: int) -> None:
        spec, device = model.spec, model.device
        self.model, self.head_rows = model, head_rows
        self.store = model.network.new_store(rows, keys)
        self.store.k.normal_()
        self.store.v.normal_()
        pos = torch.arange(start, start + width, device=device).expand(rows, width).contiguous()
        limit = torch.full_like(pos, keys)
        row = torch.arange(rows, device=device)
        captured = device.type == "cuda" and rows * width <= CAPTURED_POSITIONS
        self.window = Window(
            row, pos, limit, keys, not captured, torch.zeros(rows, 2, dtype=torch.long, device=device) if captured else None
        )
        self.ids = torch.randint(0, spec.vocab, (rows, width), device=device)
        self.graph = None
        if captured:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))  # the ids and the store are still being filled there
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.run()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.out = self.run()
            self.graph = graph

    @torch.inference_mode()
    def run(self) -> Any:
        hidden = self.model.network(self.ids, self.window, self.store)[:, -self.head_rows :]
        return self.model.network.confidence(hidden.flatten(0, 1), self.model.banned, False, False)

    def __call__(self) -> None:
        self.graph.replay() if self.graph else self.run()


def in_sub_blocks(spec: ModelSpec) -> bool:
    """Whether the family decodes its blocks in parts."""
    return bool(spec.block_causal) and spec.defaults.get("small_block_size", 8) < spec.block_causal


def forwards(model: Model, peak: dict[str, float], prompt: int, gen: int, repeats: int) -> dict[str, Any]:
    """Narrow and full forwards of batch 1 against their floors."""
    spec, device = model.spec, model.device
    total, block = prompt + gen, spec.defaults.get("block_length", 32)
    keys = prompt // block * block + block if spec.block_causal else prompt + block if spec.causal_context else total
    kv = 2 * spec.layers * spec.kv_heads * spec.head_dim * model.dtype.itemsize
    out: dict[str, Any] = {}
    widths = {"block": block, "sub_block": 8} if in_sub_blocks(spec) else {"block": block}
    for name, wanted in widths.items():
        width = min(wanted, keys)
        floor = (weight_bytes(model.network, width) + keys * kv) / peak["copy_gb_s"] / 1e6
        ms = median_ms(
            Forward(model, 1, width, keys, keys - width, min(8, width) if spec.block_causal else width), device, repeats
        )
        out[f"{name}_forward_ms"], out[f"{name}_floor_ms"], out[f"{name}_ratio"] = ms, floor, ms / floor
    ms = median_ms(Forward(model, 1, total, total, 0, block), device, max(3, repeats // 4))
    flops = full_flops(spec, total, block)
    out["full_forward_ms"], out["full_tflop_s"] = ms, flops / ms / 1e9
    out["full_share_of_matmul_rate"] = flops / ms / 1e9 / peak["matmul_tflop_s"]
    return out


def random_prompts(model: Model, batch: int, longest: int) -> list[torch.Tensor]:
    """Prompts of random tokens, unequal in length."""
    torch.manual_seed(1)
    lengths = [max(1, longest - (i * 37) % (longest // 4 or 1)) for i in range(batch)]
    return [torch.randint(0, model.spec.vocab - 600, (n,)) for n in lengths]


def answers(model: Model, batch: int, prompt: int, gen: int, per_step: float, options: dict[str, Any]) -> dict[str, Any]:
    """Whole answers through the engine: `per_step` tokens a step on average, unless the options name a decoder; prompts of
    unequal lengths in a batch."""
    prompts = random_prompts(model, batch, prompt)
    pace = {} if "decoder" in options else {"decoder": "quota", "steps": max(1, round(gen / per_step))}
    config = fastdllm.DecodeConfig(gen_length=gen, stop_ids=(), **pace, **options)
    began = time.perf_counter()
    fastdllm.generate(model, prompts, config)
    cold = time.perf_counter() - began
    fastdllm.generate(model, prompts, config)  # captures what the first run met once
    stats = fastdllm.generate(model, prompts, config).stats
    return {
        "tokens_per_second": stats.tokens_per_second,
        "nfe": stats.nfe,
        "tokens_per_forward": stats.tokens_per_forward,
        "positions_per_token": sum(stats.row_positions) / stats.tokens,
        "seconds": stats.seconds,
        "forward_ms": 1e3 * stats.seconds / stats.forwards,
        "first_run_seconds": cold,
        "peak_gib": stats.peak_memory and stats.peak_memory / 2**30,
    }


class Timed:
    """A captured graph that notes when the device reached its start and its end."""

    def __init__(self, graph: torch.cuda.CUDAGraph, ends: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> None:
        self.graph, self.pool, self.ends = graph, graph.pool, ends

    def replay(self) -> None:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        stop.record()
        self.ends.append((start, stop))


def step_times(model: Model, prompt: int, gen: int, options: dict[str, Any]) -> dict[str, float]:
    """Median wall time of a block step of batch 1 in the engine's loop.

    Where all steps of a block replay one CUDA graph, also its time on the device in that loop, its time when replayed back
    to back, and the host's share of a step: the device has finished a step, and the next one has not been launched yet.
    """
    request = Request(torch.randint(0, model.spec.vocab - 600, (prompt,), device=model.device), gen)
    config = fastdllm.DecodeConfig(decoder="quota", gen_length=gen, steps=max(1, gen // 4), stop_ids=(), **options)
    runner: Runner = cuda_graph.Runner(eager_first=0) if model.device.type == "cuda" else eager.Runner()

    def walls() -> list[float]:
        found, began = [], time.perf_counter()
        for _ in decode(model, [request], assemble(model, config), runner):
            now = time.perf_counter()
            found.append(1e3 * (now - began))
            began = now
        return sorted(found)

    walls()  # compiles and captures
    found = walls()
    times = {"step_wall_ms": found[len(found) // 2]}
    free = runner.free if isinstance(runner, cuda_graph.Runner) else []
    graphs: dict[Any, Any] = {name: kept for canvas in free for name, kept in canvas.graphs.items()}
    widths = {shape.width: kept for (_, _, shape, _), kept in graphs.items()}
    if len(widths) not in (1, 2):  # besides an opening pass there are steps of several widths, or none was captured
        return times
    kept, replay = widths[min(widths)], widths[min(widths)].graph
    ends: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    kept.graph = Timed(replay, ends)
    walls()
    kept.graph = replay
    synchronise(model.device)
    device = sorted(start.elapsed_time(stop) for start, stop in ends)
    gaps = sorted(before.elapsed_time(after) for (_, before), (after, _) in pairwise(ends))
    device, gap = device[len(device) // 2], gaps[len(gaps) // 2]
    times |= {"step_device_ms": device, "host_share": gap / (gap + device)}
    return times | {"step_replay_ms": median_ms(replay.replay, model.device, 40)}


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def check_kernels() -> None:
    """The op tests, before any number is printed."""
    folder = Path(__file__).parents[2] / "tests" / "kernels"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", str(folder)], capture_output=True, text=True
    )
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-400:])
    if done.returncode not in (0, 5):
        raise SystemExit(done.stdout[-4000:] + done.stderr[-2000:])


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    out: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            out[prefix + key] = float(value)
    return out


def keep(path: Path, weights: str, report: dict[str, Any]) -> None:
    """Put a run into a file of one run for each kind of weights."""
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    whole.write_text(path, json.dumps(runs | {weights: report}, indent=1) + "\n")


def measured(model: Model, peak: dict[str, float], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Forwards, steps and whole answers of one model: the name and the figures of each, when they have been taken."""
    prompt = min(args.prompts[0], model.spec.max_length - args.gen)
    lengths = list(dict.fromkeys(min(p, prompt) for p in args.prompts))
    parts, block = in_sub_blocks(model.spec), model.spec.defaults.get("block_length", 32)
    per_step = 8 / 3 if parts else min(4, max(1, block // 2))
    if args.set:
        for length, batch, setting in product(lengths, args.batches, args.set):
            options = dict(item.split("=", 1) for item in setting.split(","))
            yield f"{setting} prompt{length}_batch{batch}", answers(model, batch, length, args.gen, per_step, options)
        return
    yield "forward", forwards(model, peak, prompt, args.gen, args.repeats)
    caches = (["block", "sub_block"] if parts else ["block"]) if model.spec.block_causal else ["prefix", "dual"]
    if model.spec.causal_context:
        caches = ["causal"]
    for cache in caches[-1:] if args.brief else caches:
        yield f"step_{cache}", step_times(model, prompt, args.gen, {"cache": cache})
    for length in lengths:
        for batch in args.batches:
            name = f"{caches[-1]}_prompt{length}_batch{batch}"
            try:
                yield name, answers(model, batch, length, args.gen, per_step, {"cache": caches[-1]})
            except torch.OutOfMemoryError as error:
                print(f"{model.name} {name}: {str(error).splitlines()[0]}", flush=True)


def show(figures: dict[str, Any], before: dict[str, float], earlier: str | None) -> None:
    """A line for each figure, with its ratio to that of an earlier run."""
    for key, value in flatten(figures).items():
        ratio = f"   x {value / before[key]:.3f} of {earlier}" if before.get(key) else ""
        print(f"{key:56s} {value:12.3f}{ratio}", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llada", "dream", "v2"], choices=list(SHAPES))
    parser.add_argument("--folder", help="a real checkpoint in place of random weights")
    parser.add_argument("--quantize", choices=KINDS, help="weights in 8 or 4 bits")
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE,...",
        help="measure only whole answers with these options of DecodeConfig; each time it is given is one setting",
    )
    parser.add_argument("--batches", nargs="+", type=COUNT, help=f"{GPU_RUN['batches']}, on a CPU {CPU_RUN['batches']}")
    parser.add_argument("--prompts", nargs="+", type=COUNT, help="lengths of prompts; the first also shapes the forwards")
    parser.add_argument("--gen", type=COUNT, help=f"new tokens: {GPU_RUN['gen']}, on a CPU {CPU_RUN['gen']}")
    parser.add_argument(
        "--brief", action="store_true", help=f"fewer and shorter runs, no op tests: {BRIEF_RUN} unless given otherwise"
    )
    parser.add_argument("--cpu", action="store_true", help="the shipped tiny models on the CPU")
    parser.add_argument("--skip-checks", action="store_true", help="do not run the op tests first")
    parser.add_argument("--output", type=output_file, help="also write the figures to this file, under the kind of weights")
    parser.add_argument("--compare", help="a file whose last line is an earlier run's JSON")
    parser.add_argument("--repeats", type=COUNT, help="of which the median is taken")
    args = parser.parse_args(arguments)
    if args.cpu and not args.folder and (missing := [name for name in args.models if name not in TINY]):
        parser.error(f"--cpu: no shipped model has the format of {missing[0]}; give --folder")
    for name, value in (CPU_RUN if args.cpu else BRIEF_RUN if args.brief else GPU_RUN).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = usable("cpu" if args.cpu else "cuda")
    before = (
        flatten(json.loads(Path(args.compare).read_text(encoding="utf-8").strip().splitlines()[-1])) if args.compare else {}
    )
    if device.type == "cuda" and not (args.skip_checks or args.brief):
        check_kernels()
    peak = ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__, "triton": version("triton") if find_spec("triton") else None,
        "python": platform.python_version(), "commit": commit(),
        "date": str(date.today()), "ceilings": peak,
    }  # fmt: skip
    print(f"{report['device']}, torch {report['torch']}, commit {report['commit']}")
    show({"ceilings": peak}, before, args.compare)
    for name in [args.folder] if args.folder else args.models:
        if args.folder or args.cpu:
            model = fastdllm.load(args.folder or TINY[name], device=device, quantize=args.quantize)
        else:
            model = random_model(name, device, args.quantize)
        report[name] = {}
        for what, figures in measured(model, peak, args):
            report[name][what] = figures
            show({name: {what: figures}}, before, args.compare)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(report))
    if args.output:
        keep(args.output, args.quantize or ("fp32" if args.cpu else "bf16"), report)


if __name__ == "__main__":
    with one_line("decode"):
        main()
