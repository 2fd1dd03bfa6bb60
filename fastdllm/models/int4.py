# SPDX-License-Identifier: Apache-2.0
"""4-bit checkpoints of GPTQ and AWQ to the layout of our own kernels (`fastdllm.kernels.linear.int4`).

Both keep eight levels in an int32, lowest bits first, and compute (level - zero) * scale in groups of input channels:

| tensor | GPTQ (AutoGPTQ, GPTQModel) | AWQ (AutoAWQ, version "gemm") |
|---|---|---|
| qweight | [C / 8, N], eight input channels | [C, N / 8], eight output channels in the order 0 2 4 6 1 3 5 7 |
| qzeros | [groups, N / 8], less 0x11111111 (`checkpoint_format` "gptq_v2": as they are) | [groups, N / 8], in that order |
| scales | [groups, N] | [groups, N] |

GPTQ's g_idx [C], the group of each input channel, must be in order: `desc_act` permutes the channels and is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdllm.kernels.linear.int4 import HALF, UNIT, by_group, group_size, pack

WORDS = ("qweight", "qzeros", "g_idx")  # of int32; scales are floats
PARTS = ("qweight", "qzeros", "scales", "g_idx")
Headers = dict[str, tuple[Path, list[int]]]  # tensor name -> (its file, its shape)
LAYOUTS = ("gptq", "gptq_v2", "awq")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def layout_of(quantization: Mapping[str, Any]) -> str:
    """The layout, one of LAYOUTS, that config.json's `quantization_config` describes.

    Raises ValueError naming the field that asks for what is not read.
    """
    method = quantization.get("quant_method")
    if method not in ("gptq", "awq"):
        raise ValueError(f"quantization_config: quant_method={method!r} is not one of gptq, awq")
    if (bits := quantization.get("bits", quantization.get("w_bit"))) != 4:
        raise ValueError(f"quantization_config: bits={bits!r} is not read; allowed is 4")
    if method == "awq":
        if (version := str(quantization.get("version", "gemm")).lower()) != "gemm":
            raise ValueError(f"quantization_config: version={version!r} is not read; allowed is 'gemm'")
        return "awq"
    if (order := quantization.get("desc_act")) not in (False, None):
        raise ValueError(f"quantization_config: desc_act={order!r} is not read; allowed is False (channels in order)")
    layout = quantization.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(f"quantization_config: checkpoint_format={layout!r} is not one of gptq, gptq_v2")
    return layout


def convert(tensors: Mapping[str, Tensor], layout: str) -> tuple[Tensor, Tensor]:
    """One projection's `qweight`, `qzeros`, `scales` (and `g_idx`) -> (weight, scale) as `kernels.linear` takes them.

    layout: one of LAYOUTS. Levels, zeros and scales stay what they are; nothing is rounded again.
    Raises ValueError for shapes that do not fit together, or for channels that are not in order.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    qweight, qzeros, scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
    if layout == "awq":
        levels, zeros = _columns(qweight, AWQ_ORDER).T, _columns(qzeros, AWQ_ORDER).T
    else:
        if layout == "gptq":  # a zero of 0 borrowed from its neighbour, so that the words are added to, not their parts
            qzeros = qzeros + 0x11111111
        levels, zeros = _columns(qweight.T, range(8)), _columns(qzeros, range(8)).T
    (outputs, channels), groups = levels.shape, scales.shape[0]
    if scales.shape[1] != outputs or zeros.shape != (outputs, groups):
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        raise ValueError(f"{layout} tensors do not fit together: {shapes}")
    size = channels // groups
    if size * groups != channels:
        raise ValueError(
            f"{layout}: {channels} channels are no whole number of {groups} groups; a shorter last one is not read"
        )
    if groups > 1 and size != group_size(scales.T, channels):
        raise ValueError(f"{layout}: {channels} channels in {groups} groups; a group must be a power of two of channels")
    g_idx = tensors.get("g_idx")
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(channels, device=g_idx.device) // size):
        raise ValueError(f"{layout}: g_idx permutes the channels (desc_act), which is not read")
    if "bias" in tensors and bool(tensors["bias"].any()):  # sync: at load
        raise ValueError(f"{layout}: a projection has a bias, and the family has none there")
    return pack(levels), torch.stack([scales.T, zeros.to(scales.dtype)], -1).contiguous()


def take_packed(found: Headers, table: Mapping[str, tuple[str, int]], layout: str) -> dict[str, dict[str, tuple[Path, str]]]:
    """Published weight -> part -> (file, tensor) of every projection in 4 bits.

    Their parts go from `found`, and the weights [N, C] that they stand for come in their place. A bias that the family does
    not know is a part too: GPTQ writes one of zeros for every projection.
    Raises ValueError where a part is missing, or where nothing is packed.
    """
    packed = {}
    for name in table:
        stem = name.removesuffix("weight")
        if stem + "qweight" not in found:
            continue
        path, shape = _check_parts(found, stem, layout)
        if name in found:
            raise ValueError(f"{found[name][0]}: {name} is there beside {stem}qweight, which stands for it")
        parts = [*PARTS, "bias"] if stem + "bias" not in table else PARTS
        packed[name] = {part: (found.pop(stem + part)[0], stem + part) for part in parts if stem + part in found}
        found[name] = path, shape
    if not packed:
        raise ValueError(f"config.json has a quantization_config ({layout}), but the checkpoint has no packed weights")
    return packed


def _check_parts(found: Headers, stem: str, layout: str) -> tuple[Path, list[int]]:
    """The file and the shape [N, C] of the weight whose parts are called `stem` and PARTS. Raises ValueError where a part is
    missing, or where its shape is not that of the table above."""
    path = found[stem + "qweight"][0]
    shapes = {part: found[stem + part][1] for part in (*PARTS, "bias") if stem + part in found}
    if missing := [part for part in PARTS[:3] if part not in shapes]:
        raise ValueError(f"{path}: {stem}qweight comes without {stem}{missing[0]}")
    for part in ("qweight", "scales"):
        if len(shapes[part]) != 2:
            raise ValueError(f"{path}: {stem}{part} has shape {shapes[part]}, not two dimensions")
    rows, columns = shapes["qweight"]
    outputs, channels = (8 * columns, rows) if layout == "awq" else (columns, 8 * rows)
    groups = shapes["scales"][0]
    expected = {"scales": [groups, outputs], "qzeros": [groups, outputs // 8], "g_idx": [channels], "bias": [outputs]}
    for part, shape in expected.items():
        if part in shapes and (shapes[part] != shape or not groups):
            raise ValueError(
                f"{path}: {stem}{part} has shape {shapes[part]}; with {stem}qweight of {shapes['qweight']} and "
                f"{groups} groups {layout} has {shape}"
            )
    return path, [outputs, channels]


def make_room(network: nn.Module, table: Mapping[str, tuple[str, int]], scales: Mapping[str, Tensor]) -> None:
    """Give the projections that are packed parameters for it. scales: of each packed published weight, its `scales`.

    Raises ValueError where only a part of a fused projection is packed, or in groups of another size.
    """
    for target in {table[name][0] for name in scales}:
        names = [name for name, (other, _) in table.items() if other == target]
        if plain := [name for name in names if name not in scales]:
            raise ValueError(f"{plain[0]!r} is not packed, but other weights of the same fused projection are")
        module = network.get_submodule(target.removesuffix(".weight"))
        (outputs, channels), device = module.weight.shape, module.weight.device
        groups = {len(scales[name]) for name in names}
        if len(groups) > 1:
            raise ValueError(f"{names[0]!r} and the weights that it is fused with have groups of different sizes")
        weight = torch.empty(outputs, -(-channels // UNIT) * HALF, dtype=torch.uint8, device=device)
        module.weight = nn.Parameter(weight, requires_grad=False)
        dtype = reduce(torch.promote_types, [scales[name].dtype for name in names])  # in which every one is what it was
        module.scale = by_group(torch.empty(outputs, groups.pop(), 2, dtype=dtype, device=device))


def _columns(packed: Tensor, order: range | tuple[int, ...]) -> Tensor:
    """int32 [R, n], eight levels each -> [R, 8 n] uint8; the k-th lowest four bits hold column order[k] of eight."""
    shift = torch.arange(8, device=packed.device, dtype=torch.int32) * 4
    levels = ((packed.unsqueeze(-1) >> shift) & 15).to(torch.uint8)
    place = torch.tensor(list(order), device=packed.device)
    return torch.empty_like(levels).index_copy_(-1, place, levels).flatten(1)
