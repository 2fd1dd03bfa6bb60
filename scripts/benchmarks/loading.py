# SPDX-License-Identifier: Apache-2.0
"""How fast a checkpoint in LLaDA-8B's published format loads, and in how much memory, against its size.

    python -m scripts.benchmarks.loading                              # 16 GB in six shards, onto the GPU
    python -m scripts.benchmarks.loading --device cpu --layers 1      # 2.5 GB onto the CPU

Writes a synthetic checkpoint into a temporary folder and loads it twice, each time in a new process: once after its pages
were dropped from the page cache, once straight after. Whether they really came from the disk is in `from_disk`, the bytes
that the kernel counts as fetched (null where it does not say). The floors are measured in the same run: reading the cached
files into a buffer, and copying pinned memory to the device. Host memory is the peak of resident pages, mapped files
included, above what the process held before (on the CPU the weights are part of it). Some tensors are compared with what
was written, and the model decodes once from a prompt of ids. A line is printed after each step, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import fastdllm
from fastdllm import whole
from fastdllm.arguments import COUNT, Parser
from fastdllm.models.llada import FAMILY
from fastdllm.models.spec import ModelSpec
from fastdllm.models.weights import expected_shapes, parameter_shapes
from fastdllm.shell import one_line
from scripts.benchmarks.decode import LLADA_8B, commit, median_ms, synchronise, usable

HEAD_DIM = LLADA_8B["d_model"] // LLADA_8B["n_heads"]
IN_BYTES, OTHER = ("from_disk", "host_peak", "device_peak"), ("seconds", "gb_s", "first_answer_seconds")
POOL = 2**22 + 15  # odd, so that equal columns of neighbouring rows hold different values


def small_config(layers: int, width: int, vocab: int) -> dict[str, Any]:
    """config.json of LLaDA-8B at another size; at the published size the special ids are the published ones."""
    heads = width // HEAD_DIM
    size = {"n_layers": layers, "d_model": width, "n_heads": heads, "n_kv_heads": heads, "mlp_hidden_size": 3 * width}
    ids = {"mask_token_id": vocab - 128, "eos_token_id": vocab - 383, "pad_token_id": vocab - 383}
    return {**LLADA_8B, **size, **ids, "model_type": "llada", "vocab_size": vocab, "embedding_size": vocab}


class Values:
    """What each tensor holds: windows of one pool of normal values, so that 16 GB cost no more than copying them."""

    def __init__(self, spec: ModelSpec) -> None:
        self.table = FAMILY.names(spec)
        self.shapes = expected_shapes(self.table, parameter_shapes(spec))
        self._place = {name: i for i, name in enumerate(self.table)}
        self._pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        size, first = math.prod(shape), self._place[name] * 9973 % POOL
        tensor = self._pool.roll(-first).repeat(-(-size // POOL))[:size].view(shape)
        return tensor if len(shape) > 1 else tensor + 1  # the vectors are the norms' weights

    def nbytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * torch.bfloat16.itemsize


def write_checkpoint(folder: Path, config: dict[str, Any], shards: int) -> list[str]:
    """The published files, one shard in memory at a time; returns the last tensor of each shard."""
    values = Values(FAMILY.spec(config, {}))
    total, filled = sum(map(values.nbytes, values.table)), 0
    parts: list[list[str]] = [[] for _ in range(shards)]
    for name in values.table:
        parts[min(shards - 1, filled * shards // total)].append(name)
        filled += values.nbytes(name)
    where: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        path = folder / f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file({name: values[name] for name in part}, path, metadata={"format": "pt"})
        where |= dict.fromkeys(part, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    whole.write_text(folder / "model.safetensors.index.json", json.dumps(index))
    whole.write_text(folder / "config.json", json.dumps(config))
    return [part[-1] for part in parts if part]


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the files' pages, so that reading them goes to the disk; it may decline."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def counter(file: str, name: str) -> int | None:
    """A number of this process from /proc, None where there is none. Not `ru_maxrss`: a child inherits its parent's."""
    try:
        found = re.search(rf"^{name}:\s*(\d+)( kB)?$", Path("/proc/self", file).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * (1024 if found[2] else 1) if found else None


def floors(folder: Path, device: torch.device) -> dict[str, float]:
    """GB/s of reading the files into a buffer that stays, and on CUDA of copying that buffer to the device."""
    buffer = torch.zeros(2**26, dtype=torch.uint8, pin_memory=device.type == "cuda")
    view, size = memoryview(buffer.numpy().data), 0
    began = time.perf_counter()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(view):
                size += read
    out = {"read_gb_s": size / (time.perf_counter() - began) / 1e9}
    if device.type == "cuda":
        target = torch.empty_like(buffer, device=device)
        out["copy_gb_s"] = buffer.nbytes / median_ms(lambda: target.copy_(buffer, non_blocking=True), device, 20) / 1e6
    return out


def load(folder: str, device: torch.device, checked: list[str]) -> dict[str, Any]:
    """Load in a process that did nothing else yet; then compare `checked` tensors and decode 32 tokens."""
    torch.zeros(1, device=device)
    synchronise(device)
    host, disk = counter("status", "VmRSS"), counter("io", "read_bytes")
    began = time.perf_counter()
    model = fastdllm.load(folder, device, "bfloat16")
    synchronise(device)
    seconds = time.perf_counter() - began
    peak, fetched = counter("status", "VmHWM"), counter("io", "read_bytes")
    out: dict[str, Any] = {
        "seconds": seconds,
        "host_peak": None if peak is None or host is None else peak - host,
        "device_peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "from_disk": None if fetched is None or disk is None else fetched - disk,
    }
    values, parameters = Values(model.spec), dict(model.network.named_parameters())
    for name in checked:
        target, row = values.table[name]
        expected = values[name].to(device)
        if not torch.equal(parameters[target][row : row + len(expected)], expected):
            raise SystemExit(f"{name} differs from what was written")
    prompt = torch.randint(0, model.spec.vocab - 600, (64,), generator=torch.Generator().manual_seed(1))
    began = time.perf_counter()
    answer = fastdllm.generate(model, [prompt], gen_length=32, stop_ids=()).sequences[0]
    out["first_answer_seconds"] = time.perf_counter() - began
    if len(answer) != 96 or (answer == model.spec.mask_id).any():
        raise SystemExit(f"the answer is not complete: {answer.tolist()}")
    return out


def row(state: str, figures: dict[str, Any], size: int) -> str:
    """A line of the table: what a load took, in bytes and as a multiple of the checkpoint's size, and in seconds."""
    sizes = [(n := figures[c]) is not None and f"{n / 1e9:.2f} GB ({n / size:.2f}x)" for c in IN_BYTES]
    rest = [f"{figures[c]:.2f}" for c in OTHER]
    return f"{state:12s}" + "".join(f"{cell or '-':>22s}" for cell in sizes + rest)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=COUNT, default=LLADA_8B["n_layers"])
    parser.add_argument("--width", type=COUNT, default=LLADA_8B["d_model"], help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--vocab", type=COUNT, default=LLADA_8B["vocab_size"], help="at least 1024")
    parser.add_argument("--shards", type=COUNT, default=6)
    parser.add_argument("--folder", help="where the temporary folder is made")
    args = parser.parse_args(arguments)

    device, config = usable(args.device), small_config(args.layers, args.width, args.vocab)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__, "python": platform.python_version(), "commit": commit(),
    }  # fmt: skip
    print(f"{report['device']}, torch {report['torch']}, commit {report['commit']}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        checked = write_checkpoint(folder, config, args.shards)
        middle = f"model.transformer.blocks.{args.layers // 2}."
        checked += [middle + f"{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj", "ff_norm")]
        report["write_seconds"] = time.perf_counter() - began
        report["bytes"] = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["metadata"][
            "total_size"
        ]
        report["largest_tensor"] = args.vocab * args.width * torch.bfloat16.itemsize
        size = report["bytes"]
        print(f"{size / 1e9:.2f} GB in {args.shards} shards written, largest tensor {report['largest_tensor'] / 1e9:.2f} GB")
        print("page cache  " + "".join(f"{column:>22s}" for column in (*IN_BYTES, *OTHER)), flush=True)
        drop_pages(folder)
        for state in ("dropped", "cached"):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                report[state] = process.submit(load, name, device, checked).result()
            report[state]["gb_s"] = size / report[state]["seconds"] / 1e9
            print(row(state, report[state], size), flush=True)
        report["floors"] = floors(folder, device)
    print("floors: " + ", ".join(f"{name} {value:.2f}" for name, value in report["floors"].items()))
    print(json.dumps(report))


if __name__ == "__main__":
    with one_line("loading"):
        main()
