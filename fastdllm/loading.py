# SPDX-License-Identifier: Apache-2.0
"""How a command line says in which form a model is loaded: the options besides the model's name, for every command."""

from __future__ import annotations

import argparse
from typing import Any

from fastdllm.models.quantize import KINDS

PLACE = ("revision", "device", "dtype")
WEIGHTS = ("quantize", "adapter")


def add_place_options(group: Any) -> None:
    """--revision, --device and --dtype. group: an `argparse` parser or a group of one."""
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    group.add_argument("--dtype", help="float32, bfloat16, float16 (default: bfloat16 on cuda, float32 elsewhere)")


def add_weight_options(group: Any) -> None:
    """--quantize and --adapter, which change the weights."""
    group.add_argument("--quantize", choices=tuple(KINDS), help="weights in 8 or 4 bits (default: as they are)")
    group.add_argument("--adapter", metavar="PATH", help="folder or hub id of a LoRA adapter, merged into the weights")


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `fastdllm.load`, besides the name, that a command line gives; None for what it leaves open."""
    return {name: getattr(args, name, None) for name in (*PLACE, *WEIGHTS)}
