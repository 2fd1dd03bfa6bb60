# SPDX-License-Identifier: Apache-2.0
"""Time whole forwards of a published shape with the tile of one product changed, from which the kernels' tiles were chosen.

    python -m scripts.benchmarks.tiles --model v2 --quantize fp8 --width 8 --keys 160 --product down
    python -m scripts.benchmarks.tiles --model llada --quantize int4 --product gate_up

A product timed by itself, again and again, misleads: a tile that takes much shared memory is fast there, but keeps the
programs of the next kernel waiting. So the forward is what is timed, captured as a graph. The first and the last line are
the tile that the package takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastdllm.arguments import COUNT, Parser
from fastdllm.kernels.linear.int4 import UNIT
from fastdllm.models import Model
from fastdllm.models.quantize import KINDS
from fastdllm.models.weights import parameter_shapes
from fastdllm.shell import one_line
from scripts.benchmarks.decode import SHAPES, Forward, median_ms, random_model, usable

with one_line("tiles"):  # an environment without Triton is one line
    from triton.runtime.errors import OutOfResources

    from fastdllm.kernels.gluon import usable as takes_gluon
    from fastdllm.kernels.linear import triton as linear_triton
    from fastdllm.kernels.linear.hopper import PAIRED
    from fastdllm.kernels.silu_mul import triton as silu_mul_triton

PRODUCTS = ("qkv", "out", "gate_up", "down")
DENSE = [
    name for name, (family, config) in SHAPES.items() if not family.spec(config, {}).experts
]  # experts have other products
REPEATS = 25


def candidates(product: str, rows: int, kind: str | None) -> Iterator[dict[str, int]]:
    """Tiles of a product of `rows` rows, of weights of this kind (None: bf16)."""
    block_m = max(16, 1 << (rows - 1).bit_length())
    itemsize = 1 if kind in ("fp8", "int8") else 2
    depths = [UNIT] if kind == "int4" else [n // itemsize for n in (128, 256, 512)]
    splits = [1] if product == "gate_up" else [1, 2, 3, 4, 6]
    for block_n, depth, stages, parts in itertools.product(
        (32, 64) if product == "gate_up" else (64,), depths, (2, 3, 4, 5), splits
    ):
        tile = {"block_n": block_n, "block_c": depth, "num_warps": 4, "num_stages": stages, "block_m": block_m}
        yield tile if product == "gate_up" else tile | {"splits": parts}


def with_tile(product: str, shape: tuple[int, ...], tile: dict[str, int]) -> AbstractContextManager[Any]:
    """Launches of the product with these output and input channels take `tile`."""
    module = silu_mul_triton if product == "gate_up" else linear_triton
    tile_of = module.tile_of

    def chosen(x: Tensor, w: Tensor, scale: Tensor | None = None) -> dict[str, int]:
        return tile if (len(w), x.shape[1]) == shape else tile_of(x, w, scale)

    return mock.patch.object(module, "tile_of", chosen)


def milliseconds(model: Model, rows: int, width: int, keys: int) -> float:
    """Of one forward of `rows` sequences, `width` positions each, the last of `keys`."""
    torch.manual_seed(0)
    run = Forward(model, rows, width, keys, keys - width, min(32, width))
    return min(median_ms(run, model.device, REPEATS) for _ in range(2))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="llada", choices=DENSE)
    parser.add_argument("--quantize", choices=list(KINDS), help="default: bf16")
    parser.add_argument("--product", required=True, choices=PRODUCTS)
    parser.add_argument("--rows", type=COUNT, default=1, help="sequences")
    parser.add_argument("--width", type=COUNT, default=32, help="positions of each")
    parser.add_argument("--keys", type=COUNT, default=1256, help="positions in the store, those of the forward included")
    args = parser.parse_args(argv)
    if args.width > args.keys:
        parser.error(f"--keys {args.keys} must be at least --width {args.width}")
    if args.rows * args.width > linear_triton.SKINNY_ROWS:
        parser.error(f"--rows times --width must be at most {linear_triton.SKINNY_ROWS}: of more, other kernels take over")
    device = usable("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    model = random_model(args.model, device, args.quantize)
    shape = parameter_shapes(model.spec)[f"layers.0.{args.product}.weight"]
    work = args.rows, args.width, args.keys
    print(f"{milliseconds(model, *work):.3f} ms  as it is")
    found = []
    least = PAIRED if args.quantize == "int8" and takes_gluon(device) else 0  # of smaller depth a tile is rounded up
    for tile in candidates(args.product, args.rows * args.width, args.quantize):
        if tile["block_c"] < least:
            continue
        try:
            with with_tile(args.product, shape, tile):
                found.append((milliseconds(model, *work), tile))
        except (RuntimeError, OutOfResources) as error:  # the device has no room for this tile
            print(f"{tile}: {str(error).splitlines()[0]}")
    for time, tile in sorted(found, key=lambda pair: pair[0]):
        print(f"{time:.3f} ms  {tile}")
    print(f"{milliseconds(model, *work):.3f} ms  as it is")


if __name__ == "__main__":
    with one_line("tiles"):
        main()
