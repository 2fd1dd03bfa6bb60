# SPDX-License-Identifier: Apache-2.0
"""4-bit checkpoints: layouts packed here by the published rule, word by word, and read back; a network in 4 bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastdllm
from fastdllm.forward import Window
from fastdllm.kernels import quantize_weight
from fastdllm.kernels.linear.int4 import widen
from fastdllm.models import int4, load, quantize
from tests.published_checkpoints import write_checkpoint
from tests.random_models import random_model


def published(layout: str, N: int, C: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of one projection, and the weights [N, C] that they stand for, in float64."""
    level, zero = torch.randint(0, 16, (N, C)), torch.randint(0, 16, (N, C // group))
    scales = (torch.rand(C // group, N) + 0.5).half() / 16
    columns = int4.AWQ_ORDER if layout == "awq" else range(8)

    def word(values: list[int]) -> int:
        """Eight values of 0..15 in 32 bits, as a signed number."""
        bits = sum(values[columns[k]] << 4 * k for k in range(8))
        return bits - (1 << 32) if bits >= 1 << 31 else bits

    def by_output(x: Tensor) -> Tensor:
        """[N, n] -> [n, N / 8]."""
        return torch.tensor([[word(x[i : i + 8, c].tolist()) for i in range(0, N, 8)] for c in range(x.shape[1])])

    if layout == "awq":
        qweight = by_output(level)
    else:
        qweight = torch.tensor([[word(level[n, i : i + 8].tolist()) for n in range(N)] for i in range(0, C, 8)])
    tensors = {"qweight": qweight.int(), "qzeros": by_output(zero).int(), "scales": scales}
    if layout.startswith("gptq"):
        tensors["g_idx"] = (torch.arange(C) // group).int()
    if layout == "gptq":
        tensors["qzeros"] -= 0x11111111
    step, zero = (x.double().repeat_interleave(group, 1) for x in (scales.T, zero))
    return tensors, (level - zero) * step


@pytest.mark.parametrize("layout", int4.LAYOUTS)
@pytest.mark.parametrize(("N", "C", "group"), [(8, 64, 64), (24, 512, 128), (16, 96, 32)])
def test_layouts(layout: str, N: int, C: int, group: int) -> None:
    tensors, want = published(layout, N, C, group)
    weight, scale = int4.convert(tensors, layout)
    assert scale.dtype == torch.float16 and scale.is_contiguous()
    torch.testing.assert_close(widen(weight, scale, C).double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("zeros", [[0] * 8, [0, 1, 0, 15, 8, 0, 0, 7], [15] * 8])
def test_a_zero_of_0_borrows_from_its_neighbour(zeros: list[int]) -> None:
    """GPTQModel writes its first format from the second by a subtraction of whole words."""
    tensors, _ = published("gptq", 8, 32, 32)
    word = (sum(zero << 4 * k for k, zero in enumerate(zeros)) - 0x11111111) % (1 << 32)
    tensors["qzeros"].fill_(word - (1 << 32) if word >> 31 else word)
    assert int4.convert(tensors, "gptq")[1][..., 1].flatten().tolist() == zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g_idx": torch.arange(64).flip(0).int() // 32}, "g_idx permutes the channels"),
        ({"scales": torch.ones(2, 16).half()}, "do not fit together"),
        ({"qzeros": torch.zeros(1, 1, dtype=torch.int32)}, "do not fit together"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    tensors, _ = published("gptq", 8, 64, 32)
    with pytest.raises(ValueError, match=message):
        int4.convert(tensors | change, "gptq")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4, "desc_act": False}, "gptq"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMM"}, "awq"),
        ({"quant_method": "awq", "w_bit": 4}, "awq"),
    ],
)
def test_configurations(given: dict[str, Any], expected: str) -> None:
    assert int4.layout_of(given) == expected


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({}, "quant_method=None"),
        ({"quant_method": "bitsandbytes", "bits": 4}, "quant_method='bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act=True"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv'"),
    ],
)
def test_what_is_not_read_is_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"quantization_config: {field}"):
        int4.layout_of(given)


@pytest.mark.parametrize("family", ["llada", "dream", "v2"])
def test_a_network_in_four_bits_answers(family: str) -> None:
    """Every projection is packed, a head keeps 8 bits, and nothing else changes its type."""
    model = random_model(family)
    before = {name: p.dtype for name, p in model.network.named_parameters()}
    quantize.quantize(model.network, "int4")
    for name, p in model.network.named_parameters():
        projection = name.startswith("layers.") and name.endswith(".weight")
        head = name == "head.weight" and not model.spec.tied_head
        assert p.dtype == (torch.uint8 if projection else torch.int8 if head else before[name]), name
    out = fastdllm.generate(model, [torch.tensor([3, 4, 5])], gen_length=8, block_length=8, stop_ids=())
    assert len(out.sequences[0]) == 11 and model.spec.mask_id not in out.sequences[0]


def test_an_eight_billion_model_takes_less_than_five_and_a_half_gibibytes() -> None:
    """LLaDA-8B's shapes: 4-bit projections with their steps, a head of 8 bits, an embedding in bf16."""
    width, ffn, layers, vocab = 4096, 12288, 32, 126464
    shapes = [(3 * width, width), (width, width), (2 * ffn, width), (width, ffn)]
    packed = [t for shape in shapes for t in quantize_weight(torch.empty(shape, device="meta"), "int4")]
    layer = sum(t.nbytes for t in packed) + 2 * 2 * width
    assert layers * layer + 2 * vocab * width + vocab * (width + 4) + 2 * width <= 5.5 * 2**30


def pack_checkpoint(folder: Path, layout: str, group: int) -> dict[str, Tensor]:
    """Replace every projection of a checkpoint by packed tensors; returns the weights that they stand for."""
    path, plain = folder / "model.safetensors", {}
    stored = load_file(path)
    for name, weight in list(stored.items()):
        if weight.ndim == 2 and (".blocks." in name or ".layers." in name):
            tensors, plain[name] = published(layout, *weight.shape, group)
            del stored[name]
            stored |= {name.removesuffix("weight") + part: t for part, t in tensors.items()}
            if layout.startswith("gptq") and name.removesuffix("weight") + "bias" not in stored:
                stored[name.removesuffix("weight") + "bias"] = torch.zeros(weight.shape[0])
    save_file({name: t.contiguous() for name, t in stored.items()}, path)
    return plain


# As AutoGPTQ, GPTQModel and AutoAWQ write quantization_config, with groups of 16 for 128.
AUTOGPTQ = {
    **{"bits": 4, "group_size": 16, "damp_percent": 0.1, "desc_act": False, "static_groups": False, "sym": True},
    **{"true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq"},
}
GPTQMODEL = {
    **{"bits": 4, "dynamic": None, "group_size": 16, "desc_act": False, "sym": False, "lm_head": False},
    **{"quant_method": "gptq", "checkpoint_format": "gptq_v2", "pack_dtype": "int32"},
    "meta": {"quantizer": ["gptqmodel:2.0.0"], "static_groups": False, "true_sequential": True, "mse": 0.0},
}
AUTOAWQ = {
    **{"bits": 4, "group_size": 16, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm"},
    "zero_point": True,
}


def quantization(layout: str) -> dict[str, Any]:
    return {"gptq": AUTOGPTQ, "gptq_v2": GPTQMODEL, "awq": AUTOAWQ}[layout]


@pytest.mark.parametrize("layout", int4.LAYOUTS)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_packed_checkpoint_is_the_network_that_it_stands_for(tmp_path: Path, family: str, layout: str) -> None:
    """Weights land in 4 bits, in their rows of the fused projections, and give what the same weights in fp32 give."""
    tensors = write_checkpoint(tmp_path / "packed", family, quantization_config=quantization(layout))
    weights = pack_checkpoint(tmp_path / "packed", layout, 16)
    write_checkpoint(tmp_path / "plain", family)
    stored = {name: weights.get(name, t).float().contiguous() for name, t in tensors.items()}
    save_file(stored, tmp_path / "plain" / "model.safetensors")
    packed, wide = (load(tmp_path / name, device="cpu") for name in ("packed", "plain"))
    for layer, other in zip(packed.network.layers, wide.network.layers, strict=True):
        for name in ("qkv", "out", "gate_up", "down"):
            one, two = getattr(layer, name), getattr(other, name).weight
            assert one.weight.dtype == torch.uint8
            torch.testing.assert_close(widen(one.weight, one.scale, two.shape[1]).float(), two, rtol=1e-6, atol=1e-6)
    pos = torch.arange(6)[None]
    window = Window(torch.zeros(1, dtype=torch.long), pos, torch.full_like(pos, 6), 6, True)
    ids = torch.randint(0, 8, (1, 6))
    hidden = [m.network(ids, window, m.network.new_store(1, 6)) for m in (packed, wide)]
    torch.testing.assert_close(*hidden, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"desc_act": True}, "desc_act=True is not read; allowed is False"),
        ({"desc_act": "false"}, "desc_act='false' is not read; allowed is False"),
        ({"bits": 8}, "bits=8 is not read"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not one of"),
    ],
)
def test_a_packed_checkpoint_of_another_kind_is_named_with_its_file(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_checkpoint(tmp_path, "dream", quantization_config={**AUTOGPTQ, **change})
    with pytest.raises(ValueError, match=f"^{tmp_path}: config.json: quantization_config: {message}"):
        load(tmp_path)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_packed_weights_that_config_json_does_not_describe(tmp_path: Path, config: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, "dream", **config)
    pack_checkpoint(tmp_path, "gptq", 16)
    with pytest.raises(ValueError, match=f"^{tmp_path}: weights as GPTQ and AWQ pack them, but no quantization_config"):
        load(tmp_path)


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda t: t.flatten(),
    "one number": lambda t: t.flatten()[0],
    "a dimension more": lambda t: t[None],
    "no rows": lambda t: t[:0],
    "half the rows": lambda t: t[: len(t) // 2],
    "twice the rows": lambda t: torch.cat([t, t]),
    "turned": lambda t: t.T if t.ndim == 2 else t.flip(0),
    "of another type": lambda t: t.int() if t.is_floating_point() else t.float(),
    "of 64 bits": lambda t: t.double() * 1e300 if t.is_floating_point() else t.long(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", int4.PARTS)
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_a_damaged_part_of_a_packed_weight_is_named_with_its_file(
    tmp_path: Path, layout: str, part: str, damage: str
) -> None:
    if part == "g_idx" and (layout == "awq" or damage == "flat"):
        pytest.skip("AWQ has no g_idx, and GPTQ's is flat")
    write_checkpoint(tmp_path, "dream", quantization_config=quantization(layout))
    pack_checkpoint(tmp_path, layout, 16)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    name = next(n for n in stored if n.endswith(f"q_proj.{part}"))
    save_file(stored | {name: DAMAGE[damage](stored[name]).contiguous()}, path)
    stem = name.removesuffix(part)
    with pytest.raises(ValueError, match=f"^{path}: .*{re.escape(stem)}"):
        load(tmp_path)


def test_packed_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", quantization_config=quantization("gptq"))
    with pytest.raises(ValueError, match="no packed weights"):
        load(tmp_path)
    pack_checkpoint(tmp_path, "gptq", 16)
    with pytest.raises(ValueError, match=r"quantize='int8'.*quantised already"):
        load(tmp_path, quantize="int8")
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    save_file({n: t for n, t in stored.items() if not n.endswith("up_proj.scales")}, path)
    with pytest.raises(ValueError, match=r"up_proj\.qweight comes without .*up_proj\.scales"):
        load(tmp_path)
    bias = next(n for n in stored if n.endswith("up_proj.bias"))
    save_file(stored | {bias: torch.ones_like(stored[bias])}, path)
    with pytest.raises(ValueError, match="a projection has a bias"):
        load(tmp_path)


def test_scales_of_a_fused_projection_keep_what_they_are(tmp_path: Path) -> None:
    """In the widest of their formats: fp16 has no room for small steps in fp32."""
    write_checkpoint(tmp_path, "dream", quantization_config=quantization("awq"))
    pack_checkpoint(tmp_path, "awq", 16)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    small = {n: t.float() * 1e-9 for n, t in stored.items() if n.endswith("up_proj.scales")}
    save_file(stored | small, path)
    layers = load(tmp_path, device="cpu").network.layers
    rows = layers[0].gate_up.scale.shape[0] // 2
    name = next(n for n in sorted(small) if ".0." in n)
    assert layers[0].gate_up.scale.dtype == torch.float32
    assert torch.equal(layers[0].gate_up.scale[rows:, :, 0], small[name].T)


def test_what_stands_beside_packed_weights_must_fit_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", quantization_config=quantization("gptq"))
    pack_checkpoint(tmp_path, "gptq", 16)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    stem = next(n for n in sorted(stored) if n.endswith("up_proj.qweight")).removesuffix("qweight")
    save_file(stored | {f"{stem}weight": torch.zeros(8, 8)}, path)
    with pytest.raises(ValueError, match=f"^{path}: {re.escape(stem)}weight is there beside {re.escape(stem)}qweight"):
        load(tmp_path)
    save_file(stored | {f"{stem}bias": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=rf"^{path}: {re.escape(stem)}bias has shape \[5\]"):
        load(tmp_path)


def test_a_shorter_last_group_is_named() -> None:
    tensors, _ = published("awq", 8, 96, 32)
    tensors["scales"], tensors["qzeros"] = torch.ones(5, 8).half(), torch.zeros(5, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="96 channels are no whole number of 5 groups"):
        int4.convert(tensors, "awq")
