# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter merged while loading equals peft's own merge, and what is no plain LoRA is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdllm
from tests.published_checkpoints import write_adapter, write_checkpoint, write_json

LLADA = "model.transformer.blocks.{}."
QWEN = "model.layers.{}."
TARGETS = {
    "llada": [LLADA + n for n in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")],
    "dream": [QWEN + n for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")],
    "v2": [QWEN + n for n in ("self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")],
    "sdar": [QWEN + n for n in ("self_attn.q_proj", "self_attn.o_proj")],
    "nemotron": ["encoder.layers.{}.self_attn.o_proj"],
}


def weights(model: fastdllm.Model) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.network.named_parameters()}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    "options, scale",
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 3}, 0.75), ({"use_dora": False, "modules_to_save": None}, 2.0)],
)
def test_each_family_gets_the_product_added(tmp_path: Path, kind: str, options: dict[str, Any], scale: float) -> None:
    tensors = write_checkpoint(tmp_path / "base", kind)
    modules = [t.format(i) for t in TARGETS[kind] for i in (0, 1)]
    write_adapter(tmp_path / "lora", {n: tuple(t.shape) for n, t in tensors.items()}, modules, **options)
    pair = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in modules:
        a, b = (pair[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] + scale * (b @ a)
    merged = fastdllm.load(str(tmp_path / "base"), device="cpu", adapter=tmp_path / "lora")
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    expected = weights(fastdllm.load(str(tmp_path / "base"), device="cpu"))
    for name, value in weights(merged).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}], ids=str)
def test_the_merge_is_pefts(tmp_path: Path, rslora: bool, patterns: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen2Config(**fields, num_hidden_layers=2, vocab_size=640, tie_word_embeddings=False)
    base = transformers.Qwen2ForCausalLM(config)
    write_checkpoint(tmp_path / "base", "dream")
    save_file({n: t.clone() for n, t in base.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    options = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": ["q_proj", "down_proj"], **patterns}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**options))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "lora")
    ours = fastdllm.load(str(tmp_path / "base"), device="cpu", adapter=str(tmp_path / "lora"))
    merged = {n: t.clone().contiguous() for n, t in theirs.merge_and_unload().state_dict().items()}
    save_file(merged, tmp_path / "base" / "model.safetensors")
    expected = weights(fastdllm.load(str(tmp_path / "base"), device="cpu"))
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "use_dora=True; DoRA is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3'; only 'LORA'"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"r": 8}, "a rank of 8 on"),
        ({"r": 0}, "r=0; it must be a whole number"),
        ({"r": "4"}, "r='4'; it must be a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"rank_pattern": {"(": 4}}, "it is no regular expression"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tensors = write_checkpoint(tmp_path / "base", "dream")
    write_adapter(tmp_path / "lora", {n: tuple(t.shape) for n, t in tensors.items()}, [TARGETS["dream"][0].format(0)])
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    write_json(tmp_path / "lora" / "adapter_config.json", {**config, **changes})
    with pytest.raises(ValueError, match=f"(?s){tmp_path / 'lora'}.*{message}"):
        fastdllm.load(str(tmp_path / "base"), device="cpu", adapter=tmp_path / "lora")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(next(n for n in t if "lora_B" in n)), "only 'base_model.model.*lora_A.weight' is there"),
        (lambda t: t.update({"base_model.model.lm_head.lora_embedding_A": torch.ones(2, 2)}), "no part of a LoRA"),
        (lambda t: t.update({n.replace("layers.0", "layers.7"): v.clone() for n, v in t.items()}), "has no projection"),
        (lambda t: t.update({n: v * float("nan") for n, v in t.items()}), "has NaN or infinity"),
        (lambda t: t.update({n: v.long() for n, v in t.items()}), "holds I64"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, edit: Any, message: str) -> None:
    tensors = write_checkpoint(tmp_path / "base", "dream")
    write_adapter(tmp_path / "lora", {n: tuple(t.shape) for n, t in tensors.items()}, [TARGETS["dream"][0].format(0)])
    path = tmp_path / "lora" / "adapter_model.safetensors"
    pair = load_file(path)
    edit(pair)
    save_file(pair, path)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors.*{message}"):
        fastdllm.load(str(tmp_path / "base"), device="cpu", adapter=tmp_path / "lora")


@pytest.mark.parametrize("name", ["/no/such/folder", "nothing", "a/b", 5])
def test_an_adapter_that_is_not_there_is_one_line(tmp_path: Path, name: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"adapter=|adapter 'a/b'") as caught:
        fastdllm.load("tiny-sudoku", device="cpu", adapter=name)
    assert "\n" not in str(caught.value)


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        fastdllm.load("tiny-llada", device="cpu", adapter=tmp_path)


def test_an_adapter_whose_config_is_of_another_model_says_whose_config_it_is(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "other", "dream")
    module = QWEN.format(0) + "self_attn.q_proj"
    write_adapter(tmp_path / "other", {n: tuple(t.shape) for n, t in tensors.items()}, [module])
    write_checkpoint(tmp_path / "base", "llada")
    with pytest.raises(ValueError, match=r"unexpected tensor .*\(the config.json is the adapter's, in .*other\)"):
        fastdllm.load(str(tmp_path / "base"), device="cpu", adapter=tmp_path / "other")
