# SPDX-License-Identifier: Apache-2.0
"""Compile the Hopper kernels without a GPU, in a process of its own: it imports Triton's compiler, not the interpreter."""

from __future__ import annotations

import json
import os
import re
from typing import Any

NAMES = {"bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8e4nv"}  # of torch's types in a signature
CASES = {  # a kernel, the type, rows and a tile of w, then what the kernel is compiled for
    "fp8 product": ("_product_kernel", "float8_e4m3fn", 32, (64, 512), {"SPLITS": 2, "STAGES": 3}),
    "bf16 product of a row": ("_product_kernel", "bfloat16", 1, (64, 128), {"SPLITS": 1, "STAGES": 5}),
    "fp16 product": ("_product_kernel", "float16", 64, (64, 64), {"SPLITS": 4, "STAGES": 2}),
    "fp8 gate and up": ("_gated_kernel", "float8_e4m3fn", 16, (2, 32, 256), {"STAGES": 2}),
    "bf16 gate and up": ("_gated_kernel", "bfloat16", 64, (2, 64, 64), {"STAGES": 4}),
}
EVENT = re.compile(r"(griddepcontrol\.wait)|cp\.async\.bulk\.tensor\S+ \[%r\d+\], \[(%rd\d+),")


def ptx(kernel: str, dtype: str, rows: int, tile: tuple[int, ...], constants: dict[str, Any]) -> str:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from fastdllm.kernels import gluon
    from fastdllm.kernels.linear import hopper

    def descriptor(tile: tuple[int, ...]) -> str:
        return f"tensordesc<{NAMES[dtype]}{list(tile)},{gluon.layout_of(list(tile), getattr(torch, dtype))!r}>"

    fn, scaled, block_m = getattr(hopper, kernel), dtype not in ("bfloat16", "float16"), max(16, rows)
    constants = constants | {"SCALE": scaled, "TOKEN_SCALE": scaled, "BIAS": True}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": tile[-2], "BLOCK_C": tile[-1]} | ({"M": 1} if rows == 1 else {})
    types = {"x": descriptor((block_m, tile[-1])), "w": descriptor(tile), "bias": "*bf16", "y": "*fp32", "out": "*bf16"}
    types |= {"scale": "*fp32", "token_scale": "*fp32"} | dict.fromkeys("MNFC", "i32")
    source = GluonASTSource(
        fn=fn,
        signature={name: "constexpr" if name in constants else types[name] for name in fn.arg_names},
        constexprs={(i,): constants[name] for i, name in enumerate(fn.arg_names) if name in constants},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


def events(text: str) -> list[str]:
    """Copies of x and of w, and the wait for the kernel before, in their order in the program."""
    names = dict(zip(re.findall(r"\.param \.align 64 \.b8 (\w+)\[128\]", text), "xw", strict=True))
    moved = {register: names[param] for register, param in re.findall(r"mov\.b64\s+(%rd\d+), (\w+_param_\d+);", text)}
    found = {to: moved[of] for to, of in re.findall(r"cvta\.param\.u64\s+(%rd\d+), (%rd\d+);", text)}
    return ["wait" if wait else found[register] for wait, register in EVENT.findall(text)]


def main() -> None:
    """Print the events of each case, as JSON."""
    os.environ["TRITON_INTERPRET"] = "0"
    print(json.dumps({name: events(ptx(*case)) for name, case in CASES.items()}))
