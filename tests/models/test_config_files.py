# SPDX-License-Identifier: Apache-2.0
"""config.json and generation_config.json: ids, sizes and flags, and fields that change the network."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdllm.models import CLASSES, FAMILIES, read_family, weights
from tests.models.checkpoint_folder import KINDS, edit, load
from tests.published_checkpoints import (
    ADDED,
    VOCAB,
    end_of,
    mask_of,
    special_ids,
    write_checkpoint,
    write_json,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("mask_token_id", 5, "mask_token_id=5; the tokenizer's mask"),
        ("mask_token_id", VOCAB - 1, f"mask_token_id={VOCAB - 1}; the tokenizer's mask"),
        ("eos_token_id", 5, "eos_token_id=5; in the tokenizer 5 is the text"),
        ("eos_token_id", [5], r"eos_token_id=\[5\]; in the tokenizer 5 is the text"),
        ("eos_token_id", VOCAB - 1, f"the tokenizer has no token {VOCAB - 1}"),
        ("pad_token_id", VOCAB - 1, f"the tokenizer has no token {VOCAB - 1}"),
        ("eos_token_id", -1, "it must be a token id or a list of token ids"),
        ("eos_token_id", "5", "it must be a token id or a list of token ids"),
        ("pad_token_id", True, "it must be a token id or a list of token ids"),
    ],
)
def test_an_id_of_the_config_is_the_token_it_should_be(
    tmp_path: Path, kind: str, field: str, value: Any, message: str
) -> None:
    write_checkpoint(tmp_path, kind, **{field: value})
    with pytest.raises(ValueError, match=f"(?s)config.json.*{message}"):
        load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["pad_token_id", "eos_token_id", "bos_token_id", "mask_token_id"])
def test_null_is_absent(tmp_path: Path, kind: str, field: str) -> None:
    write_checkpoint(tmp_path, kind, **{field: None})
    spec = load(tmp_path).spec
    assert spec.mask_id == special_ids(kind)[mask_of(kind)]
    assert special_ids(kind)["<|endoftext|>"] in spec.stop_ids


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("value", [None, []])
def test_without_a_stop_the_tokenizers_own_end_is_one(tmp_path: Path, kind: str, value: list[int] | None) -> None:
    write_checkpoint(tmp_path, kind, eos_token_id=value)
    assert special_ids(kind)[end_of(kind)] in load(tmp_path).spec.stop_ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_stops_is_several_stops(tmp_path: Path, kind: str) -> None:
    ids = special_ids(kind)
    several = [ids["<|endoftext|>"], ids["[CLS]" if kind == "llada" else "<|im_start|>"]]
    write_checkpoint(tmp_path, kind, eos_token_id=several, pad_token_id=several)
    spec = load(tmp_path).spec
    assert set(several) <= set(spec.stop_ids) and spec.pad_id in several


def test_stop_tokens_of_generation_config_end_answers_too(tmp_path: Path) -> None:
    """transformers reads them there: who adds one to a model writes that file, and config.json keeps the old one."""
    for kind in KINDS:
        folder = tmp_path / kind
        write_checkpoint(folder, kind)
        before, ids = load(folder).spec, special_ids(kind)
        other = ids["[CLS]" if kind == "llada" else "<|im_start|>"]
        for said in (other, [ids["<|endoftext|>"], other]):
            write_json(folder / "generation_config.json", {"eos_token_id": said, "temperature": 0.7})
            spec = load(folder).spec
            assert set(spec.stop_ids) == {*before.stop_ids, other} and spec.pad_id == before.pad_id
        write_json(folder / "generation_config.json", {"eos_token_id": [VOCAB - 1, 5], "max_length": 20})
        with pytest.warns(UserWarning, match="generation_config.json has eos_token_id=5, which is no control token"):
            assert load(folder).spec == before


@pytest.mark.parametrize(
    "content", [{"eos_token_id": "x"}, {"eos_token_id": [[1]]}, {"mask_token_id": 3}, {"mask_token_id": "3"}, [1], "{"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_generation_config_that_contradicts_the_model_is_named(tmp_path: Path, kind: str, content: Any) -> None:
    write_checkpoint(tmp_path, kind)
    (tmp_path / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"generation_config.json"):
        load(tmp_path)


CHANGED = {
    "llada": [
        ("activation_type", "gelu"),
        ("activation_type", "swiglu"),
        ("scale_logits", True),
        ("input_emb_norm", True),
        ("rope", False),
        ("clip_qkv", 8.0),
        ("include_bias", True),
        ("attention_layer_norm", True),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("layer_types", ["full_attention"] * 3),  # of a network of two layers
        ("sliding_window", 128),
        ("tie_word_embeddings", True),
        ("vision_config", {"depth": 2}),
    ],
    "dream": [
        ("hidden_act", "gelu"),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", ["full_attention"]),
        ("layer_types", []),
        ("use_sliding_window", True),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [1, 2]}),
        ("attn_logit_softcapping", 30.0),
        ("mlp_bias", True),
        ("use_mrope", True),
        ("block_size", 32),
        ("query_pre_attn_scalar", 64),
        ("attention_chunk_size", 64),
        ("kv_lora_rank", 8),
        ("mlp_only_layers", [0]),
        ("num_key_value_heads", 3),
        ("is_causal", True),
    ],
    "nemotron": [
        ("sliding_window", 4096),  # counts by itself in Ministral
        ("attn_temperature_tuning", 4),
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": "dynamic"}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),  # beside rope_parameters that say otherwise
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 32}),
    ],
    "stable_diffcoder": [
        ("rope_interleave", True),
        ("swiglu_limit", 7.0),
        ("attention_bias", True),
        ("parallel_attn", True),
    ],
    "llada_moe": [
        ("num_local_experts", 8),
        ("n_routed_experts", 8),
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [0]),
        ("scoring_func", "sigmoid"),
    ],
    "llada2_moe": [("topk_method", "greedy"), ("norm_topk_prob", False), ("mlp_only_layers", [0])],
    "sdar": [("layer_types", ["sliding_attention", "full_attention"]), ("rotary_dim", 2), ("sliding_window_pattern", 2)],
}


@pytest.mark.parametrize("kind, field, value", [(k, f, v) for k, fields in CHANGED.items() for f, v in fields])
def test_a_field_that_changes_the_network_is_an_error(tmp_path: Path, kind: str, field: str, value: Any) -> None:
    write_checkpoint(tmp_path, kind, **{field: value})
    last = list(value)[-1] if isinstance(value, dict) else field
    with pytest.raises(ValueError, match=rf"{tmp_path}: config.json.*({field}|{last})"):
        load(tmp_path)


@pytest.mark.parametrize("field", ["pad_token_id", "eos_token_id"])
def test_an_id_outside_the_vocabulary_is_named_as_published(tmp_path: Path, field: str) -> None:
    write_checkpoint(tmp_path, "llada", **{field: 99999})
    with pytest.raises(ValueError, match=f"{field}=99999"):
        load(tmp_path)


@pytest.mark.parametrize("value", [3, True, 0.5, "on", [1], {"a": 1}])
def test_an_unknown_field_is_an_error(tmp_path: Path, value: Any) -> None:
    """It may change what the network computes."""
    write_checkpoint(tmp_path, "dream", my_new_trick=value)
    with pytest.raises(ValueError, match=r"config.json has fields that are not known: my_new_trick=.*delete them"):
        load(tmp_path)


def test_an_unknown_field_that_says_no_is_told_and_a_published_one_is_not(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", "dream", my_new_trick=False)
    with pytest.warns(UserWarning, match=r"config.json has fields that are not .* used: my_new_trick=(False|false)"):
        load(tmp_path / "a")
    for kind in KINDS:
        write_checkpoint(tmp_path / kind, kind)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(tmp_path / kind)


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("llada", {"num_experts": 64, "architectures": ["OtherModelLM"]}, "a mixture of experts .*num_experts=64"),
        ("llada", {"architectures": ["OtherMoEModelLM"]}, "a mixture of experts .*OtherMoEModelLM"),
        ("dream", {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantization_config: bits=3"),
        ("llada", {"quantization": {"group_size": 64, "bits": 8}}, "quantization .bits=8"),
        ("dream", {"block_size": 4, "architectures": ["DreamForCausalLM"]}, "Dream-reasoner"),
    ],
)
def test_another_network_under_a_known_model_type_is_named(
    tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    write_checkpoint(tmp_path, kind, **fields)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("kind", sorted({*FAMILIES} - {"LLaDAMoEModelLM", "LLaDAMoEModel", "StableDiffcoderForCausalLM"}))
@pytest.mark.parametrize("architecture", CLASSES)
def test_a_model_type_and_an_architecture_of_two_families_contradict(kind: str, architecture: str) -> None:
    """Tensors of one network under the other's shift or blocks would give answers that are wrong without a word."""
    config = {"model_type": kind, "architectures": [architecture]}
    if CLASSES[architecture] == FAMILIES[kind]:
        assert read_family(config, Path("folder"))
        return
    with pytest.raises(ValueError, match=rf"folder: config.json .*({architecture}|mixture of experts)"):
        read_family(config, Path("folder"))


def test_dream_reasoner_is_known_by_its_class(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", architectures=["DreamForCausalLM"])
    with pytest.raises(ValueError, match=r"architectures=.*Dream-reasoner"):
        load(tmp_path)


def test_a_tensor_says_which_network_it_is_from(tmp_path: Path) -> None:
    name, what = "model.layers.0.self_attn.q_norm.weight", "norms on queries and keys"
    write_checkpoint(tmp_path, "dream")
    save_file({**load_file(tmp_path / "model.safetensors"), name: torch.ones(8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"unexpected tensor '{name}'.*{what}"):
        load(tmp_path)


def test_biases_follow_the_config(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, "dream", attention_bias=False)
    assert not any(name.endswith(".bias") for name in tensors)
    assert load(tmp_path).network.layers[0].qkv.bias is None


HOSTILE = {
    "llada": ["n_layers", "d_model", "n_heads", "n_kv_heads", "mlp_hidden_size", "embedding_size", "max_sequence_length"],
    "v2": ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "bd_size"],
}


@pytest.mark.parametrize("kind, field", [(k, f) for k, fields in HOSTILE.items() for f in fields])
@pytest.mark.parametrize("value", [10**3, 10**5, 10**9, 10**12, 10**30, 0, -1, 2.5, "512", [512], {}, True])
def test_a_hostile_size_is_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, field: str, value: Any
) -> None:
    write_checkpoint(tmp_path, kind, tokenizer=False, **({"mask_token_id": 5} if kind == "v2" else {}))
    edit(tmp_path / "config.json", lambda c: c.update({field: value}))
    if field.startswith("max") and value in (10**3, 10**5):
        load(tmp_path)  # a long context is no fault
        return

    def build(*args: Any) -> None:
        raise AssertionError("the network was built before the headers were compared")

    monkeypatch.setattr(weights, "Transformer", build)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load(tmp_path)


@pytest.mark.parametrize(
    "field, value",
    [
        *(("rms_norm_eps", v) for v in (-1, 0, 2.0, "1e-6")),
        *(("rope_theta", v) for v in (0, -1.0, float("nan"), float("inf"), "10000")),
        *(("weight_tying", v) for v in ("no", 1, [])),
    ],
)
def test_numbers_and_flags_have_a_range(tmp_path: Path, field: str, value: Any) -> None:
    write_checkpoint(tmp_path, "llada")
    edit(tmp_path / "config.json", lambda c: c.update({field: value}))
    with pytest.raises(ValueError, match=f"config.json has {field}="):
        load(tmp_path)
