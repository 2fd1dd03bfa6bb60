# SPDX-License-Identifier: Apache-2.0
"""4-bit checkpoints: layouts packed here by the published rule, word by word, and read back; a network in 4 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm.kernels import quantize_weight
from fastdllm.kernels.linear.int4 import widen
from fastdllm.models import int4, quantize
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
    zero = zero + (layout == "gptq")
    step, zero = (x.double().repeat_interleave(group, 1) for x in (scales.T, zero))
    return tensors, (level - zero) * step


@pytest.mark.parametrize("layout", int4.LAYOUTS)
@pytest.mark.parametrize(("N", "C", "group"), [(8, 64, 64), (24, 512, 128), (16, 96, 32)])
def test_layouts(layout: str, N: int, C: int, group: int) -> None:
    tensors, want = published(layout, N, C, group)
    weight, scale = int4.convert(tensors, layout)
    assert scale.dtype == torch.float16 and scale.is_contiguous()
    torch.testing.assert_close(widen(weight, scale, C).double(), want, rtol=1e-6, atol=1e-7)


def test_zeros_of_sixteen_survive() -> None:
    """GPTQ stores zeros less one, so that 15 stands for 16."""
    tensors, _ = published("gptq", 8, 32, 32)
    tensors["qzeros"].fill_(-1)  # all bits
    assert (int4.convert(tensors, "gptq")[1][..., 1] == 16).all()


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
