# SPDX-License-Identifier: Apache-2.0
"""Files of weights: numbers that are none, tensors twice or tied, an index, pickles, and the fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdllm
from fastdllm.models import checksum
from tests.models.checkpoint_folder import KINDS, load
from tests.published_checkpoints import (
    write_checkpoint,
    write_json,
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, "dream", dtype=dtype)
    path, name = tmp_path / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name][3, 5] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"model.safetensors: tensor '{name}' has NaN or infinity"):
        load(tmp_path)


def test_weights_beyond_the_number_format_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] = 1e5
    save_file(tensors, path)
    load(tmp_path)
    with pytest.raises(ValueError, match=r"'lm_head.weight' has .* values beyond torch.float16"):
        fastdllm.load(str(tmp_path), device="cpu", dtype="float16")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_numbers_that_are_no_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, "dream")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'model.norm.weight' holds (I64|I8|BOOL|F8_E4M3)"):
        load(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada", shards=3)
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    name = "model.transformer.ln_f.weight"
    for path in (first, second):
        save_file({**load_file(path), name: torch.ones(32)}, path)
    with pytest.raises(ValueError, match=f"tensor '{name}' is in model-0000.* and again in model-0000"):
        load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, kind: str) -> None:
    tied, head, embedding = {
        "llada": ("weight_tying", "model.transformer.ff_out.weight", "model.transformer.wte.weight")
    }.get(kind, ("tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight"))
    tensors = write_checkpoint(tmp_path, kind, **{tied: True})
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), head: tensors[embedding].clone()}, path)
    load(tmp_path)
    save_file({**load_file(path), head: tensors[embedding] + 1e-3}, path)
    with pytest.raises(ValueError, match=f"ties the head to the embedding, but '{head}' differs"):
        load(tmp_path)


def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", "llada", shards=2)
    shutil.copy(tmp_path / "m" / "model-00001-of-00002.safetensors", tmp_path / "x.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for bad in (
        "../x.safetensors",
        str(tmp_path / "x.safetensors"),
        "a/b.safetensors",
        "..",
        "",
        "model.bin",
        5,
        None,
        ["x"],
    ):
        write_json(index, {**good, "weight_map": {**good["weight_map"], "model.transformer.wte.weight": bad}})
        with pytest.raises((ValueError, OSError), match=r"model\.safetensors\.index\.json"):
            load(tmp_path / "m")
    for bad in ([], "x", 5, {}, None):
        write_json(index, {"metadata": {}, "weight_map": bad})
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            load(tmp_path / "m")


def test_files_that_transformers_does_not_read_are_not_weights(tmp_path: Path) -> None:
    """An adapter beside model.safetensors, and a stray file."""
    write_checkpoint(tmp_path, "llada")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    save_file({"stray": torch.ones(1)}, tmp_path / "other.safetensors")
    load(tmp_path)


def test_a_pickle_is_not_read_and_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no .safetensors file .*pytorch_model.bin must be converted"):
        load(tmp_path)


def test_a_fingerprint_sees_every_weight(tmp_path: Path) -> None:
    """Also rows that change places, which keep every sum."""
    write_checkpoint(tmp_path, "dream")
    first, path = load(tmp_path).fingerprint(), tmp_path / "model.safetensors"
    assert load(tmp_path).fingerprint() == first
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.bias", "model.norm.weight"):
        changed = tensors[name].clone()
        changed[[3, 9]] = changed[[9, 3]] if changed.ndim > 1 else changed[[9, 3]] + torch.tensor([0.0, 1e-3])
        save_file({**tensors, name: changed}, path)
        assert load(tmp_path).fingerprint() != first
    save_file(tensors, path)
    assert fastdllm.load(str(tmp_path), device="cpu", dtype="bf16").fingerprint() != first


def test_the_checksum_of_any_shape_and_format_sees_every_byte() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for shape in ((1,), (7,), (3, 5), (64, 33)):
            tensor = (torch.randn(shape) * 50).to(dtype)
            whole = checksum(tensor, chunk=16)
            for at in (0, tensor.numel() // 2, tensor.numel() - 1):
                other = tensor.clone()
                other.view(-1)[at] += 1
                assert checksum(other, chunk=16) != whole
