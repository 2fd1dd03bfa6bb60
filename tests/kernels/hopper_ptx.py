# SPDX-License-Identifier: Apache-2.0
"""Compile the Hopper kernels without a GPU, in a process of its own: it imports Triton's compiler, not the interpreter."""

from __future__ import annotations

import importlib
import json
import os
import re
from typing import Any

BF16, FP16, FP8, WORDS = "bfloat16", "float16", "float8_e4m3fn", "int16"
NAMES = {BF16: "bf16", FP16: "fp16", FP8: "fp8e4nv", WORDS: "i16"}  # of torch's types in a signature
LINEAR, INT4, ATTENTION, WIDE = "linear.hopper", "linear.hopper_int4", "attention.hopper", "attention.hopper_wide"
OF_TILE = {"SCALE": True, "TOKEN_SCALE": True, "BIAS": True, "GROUP": 128, "HALVES": 32}
OF_HEADS = {"H": 28, "G": 7, "HIDE": True, "BLOCK_N": 64}
OF_MANY = {"H": 28, "G": 7, "D": 128, "HIDE": True, "LONGEST_FIRST": True, "BLOCK_N": 128}
# A kernel, what the copy engine reads, in the order of the arguments: its type and its tile; then the constants.
CASES: dict[str, tuple[str, str, dict[str, tuple[str, list[int]]], dict[str, Any]]] = {
    "fp8 product": (LINEAR, "_product_kernel", {"x": (FP8, [32, 512]), "w": (FP8, [64, 512])}, {"SPLITS": 2, "STAGES": 3}),
    "bf16 product of a row": (
        LINEAR, "_product_kernel", {"x": (BF16, [16, 128]), "w": (BF16, [64, 128])},
        {"SPLITS": 1, "STAGES": 5, "SCALE": False, "TOKEN_SCALE": False, "M": 1},
    ),
    "fp16 product": (
        LINEAR, "_product_kernel", {"x": (FP16, [64, 64]), "w": (FP16, [64, 64])},
        {"SPLITS": 4, "STAGES": 2, "SCALE": False, "TOKEN_SCALE": False},
    ),
    "fp8 gate and up": (LINEAR, "_gated_kernel", {"x": (FP8, [16, 256]), "w": (FP8, [2, 32, 256])}, {"STAGES": 2}),
    "bf16 gate and up": (
        LINEAR, "_gated_kernel", {"x": (BF16, [64, 64]), "w": (BF16, [2, 64, 64])},
        {"STAGES": 4, "SCALE": False, "TOKEN_SCALE": False},
    ),
    "int8 product": (
        LINEAR, "_product_kernel", {"x": (BF16, [32, 256]), "w": (WORDS, [64, 128])},
        {"SPLITS": 2, "STAGES": 3, "TOKEN_SCALE": False},
    ),
    "int8 product of many rows": (
        LINEAR, "_product_kernel", {"x": (BF16, [128, 256]), "w": (WORDS, [64, 128])},
        {"SPLITS": 1, "STAGES": 2, "TOKEN_SCALE": False},
    ),
    "int8 gate and up": (
        LINEAR, "_gated_kernel", {"x": (BF16, [16, 256]), "w": (WORDS, [2, 32, 128])}, {"STAGES": 2, "TOKEN_SCALE": False},
    ),
    "4-bit product": (INT4, "_product_kernel", {"x": (BF16, [32, 256]), "w": (WORDS, [64, 64])}, {"SPLITS": 4, "STAGES": 3}),
    "4-bit gate and up": (INT4, "_gated_kernel", {"x": (BF16, [16, 256]), "w": (WORDS, [2, 32, 64])}, {"STAGES": 4}),
    "attention": (
        ATTENTION, "_attend_kernel", {"k": (BF16, [1, 1, 64, 128]), "v": (BF16, [1, 1, 64, 128])},
        OF_HEADS | {"D": 128, "SPLITS": 4, "BLOCK_M": 16, "STAGES": 3},
    ),
    "fp16 attention of small heads": (
        ATTENTION, "_attend_kernel", {"k": (FP16, [1, 1, 64, 64]), "v": (FP16, [1, 1, 64, 64])},
        OF_HEADS | {"D": 64, "SPLITS": 8, "BLOCK_M": 16, "STAGES": 1},
    ),
    "attention of many queries": (
        WIDE, "_attend_kernel",
        {"q": (BF16, [1, 64, 1, 128]), "k": (BF16, [1, 1, 128, 128]), "v": (BF16, [1, 1, 128, 128]),
         "out": (BF16, [1, 64, 1, 128])}, OF_MANY,
    ),
    "fp16 attention of many queries": (
        WIDE, "_attend_kernel",
        {"q": (FP16, [1, 64, 1, 128]), "k": (FP16, [1, 1, 128, 128]), "v": (FP16, [1, 1, 128, 128]),
         "out": (FP16, [1, 64, 1, 128])}, OF_MANY | {"HIDE": False, "LONGEST_FIRST": False},
    ),
}  # fmt: skip
JOINED = [(28, 8), (32, 4), (64, 8), (128, 4)]  # heads and splits
EVENT = re.compile(r"(griddepcontrol\.wait)|cp\.async\.bulk\.tensor\S+ \[%r\d+\], \[(%rd\d+),")


def compiled(module: str, kernel: str, read: dict[str, tuple[str, list[int]]], constants: dict[str, Any]) -> Any:
    import torch
    from triton.experimental.gluon._runtime import GluonASTSource

    from fastdllm.kernels import gluon

    fn = getattr(importlib.import_module(f"fastdllm.kernels.{module}"), kernel)
    half = NAMES[BF16 if any(dtype in (FP8, WORDS) for dtype, _ in read.values()) else next(iter(read.values()))[0]]
    types = dict.fromkeys(("bias", "out", "q"), f"*{half}") | dict.fromkeys(("row", "kv_len", "hide"), "*i64")
    types |= dict.fromkeys(("y", "token_scale", "part", "lse"), "*fp32")
    types |= dict.fromkeys(("M", "N", "F", "C", "W", "max_kv_len", "stride_g", "stride_z"), "i32")
    types |= dict.fromkeys(("per", "tiles"), "i32")
    types["scale"] = {LINEAR: "*fp32", INT4: "*bf16"}.get(module, "fp32")
    for name, (dtype, tile) in read.items():
        types[name] = f"tensordesc<{NAMES[dtype]}{tile},{gluon.layout_of(tuple(tile), getattr(torch, dtype))!r}>"
    if "x" in read:
        constants = (
            OF_TILE | {"BLOCK_M": read["x"][1][0], "BLOCK_N": read["w"][1][-2], "BLOCK_C": read["x"][1][-1]} | constants
        )
    return built(GluonASTSource, fn, types, constants, 4)


def built(source: Any, fn: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = source(
        fn=fn,
        signature={name: "constexpr" if name in constants else types[name] for name in fn.arg_names},
        constexprs={(i,): constants[name] for i, name in enumerate(fn.arg_names) if name in constants},
    )
    return triton.compile(kernel, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})


def join_of(heads: int, splits: int) -> Any:
    """The kernel that joins attention's splits and quantises, as it is launched."""
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource

    from fastdllm.kernels.attention import hopper

    types = {"part": "*fp32", "lse": "*fp32", "out": "*fp8e4nv", "of_token": "*fp32"}
    block = triton.next_power_of_2(heads)
    constants = {"H": heads, "D": 128, "SPLITS": splits, "LARGEST": 448.0, "ROUNDED": tl.bfloat16, "BLOCK_H": block}
    return built(ASTSource, hopper._join_kernel, types, constants, hopper.join_warps(block, splits, 128))


def events(text: str, names: list[str]) -> list[str]:
    """Copies of what the names say, and the wait for the kernel before, in their order in the program."""
    params = dict(zip(re.findall(r"\.param \.align 64 \.b8 (\w+)\[128\]", text), names, strict=True))
    moved = {register: params[param] for register, param in re.findall(r"mov\.b64\s+(%rd\d+), (\w+_param_\d+);", text)}
    found = {to: moved[of] for to, of in re.findall(r"cvta\.param\.u64\s+(%rd\d+), (%rd\d+);", text)}
    return ["wait" if wait else found[register] for wait, register in EVENT.findall(text)]


def main() -> None:
    """Print the events of each case, and the bytes of shared memory that a program takes, as JSON."""
    os.environ["TRITON_INTERPRET"] = "0"
    kernels = {name: compiled(*case) for name, case in CASES.items()}
    shared = {name: kernel.metadata.shared for name, kernel in kernels.items()}
    shared |= {f"join {joined}": join_of(*joined).metadata.shared for joined in JOINED}
    found = {name: events(kernels[name].asm["ptx"], list(case[2])) for name, case in CASES.items()}
    print(json.dumps({"events": found, "shared": shared}))
