# SPDX-License-Identifier: Apache-2.0
"""Real and broken files of a checkpoint folder: ids of the files, fields that change the network, damage of every kind.

Each case stands for its class; what all of them share is that the error is a ValueError or an OSError that names the file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fastdllm
from fastdllm.models import checksum, tiny_names, weights
from fastdllm.models.hub import TINY
from fastdllm.models.tokenizer import load_tokenizer
from tests.published_checkpoints import (
    ADDED,
    VOCAB,
    byte_pairs,
    mask_of,
    special_ids,
    write_checkpoint,
    write_json,
    write_tokenizer,
)

KINDS = ["llada", "dream", "v2"]


def load(folder: Path) -> fastdllm.Model:
    return fastdllm.load(str(folder), device="cpu")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)


# --- added tokens: the ids are those of the files -------------------------------------------------------------------


def entries(tokens: dict[str, tuple[int, bool]]) -> dict[str, Any]:
    return {str(i): {"content": t, "special": special} for t, (i, special) in tokens.items()}


def write_slow(folder: Path, tokens: dict[str, tuple[int, bool]], decoder: bool = True, added: bool = True) -> None:
    """vocab.json and merges.txt, with the added tokens in one, the other or both files."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = byte_pairs()
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": entries(tokens)} if decoder else {})
    if added:
        write_json(folder / "added_tokens.json", {t: i for t, (i, _) in sorted(tokens.items())})


@st.composite
def added_tokens(draw: st.DrawFn) -> dict[str, tuple[int, bool]]:
    """Some tokens at ids behind the vocabulary, special and plain in any order, with holes."""
    first = len(byte_pairs()[0])
    ids = draw(st.lists(st.integers(first, first + 40), min_size=1, max_size=9, unique=True))
    return {f"<|t{k}|>": (i, draw(st.booleans())) for k, i in enumerate(ids)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens=added_tokens(), route=st.sampled_from(["decoder", "added", "both", "tokenizer.json"]))
def test_added_tokens_keep_their_ids_by_every_route(
    tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, tuple[int, bool]], route: str
) -> None:
    folder = tmp_path_factory.mktemp("ids")
    write_slow(folder, tokens, decoder=route != "added", added=route != "decoder")
    if route == "tokenizer.json":
        described = json.loads(load_tokenizer(folder).backend_tokenizer.to_str())
        vocab = byte_pairs()[0]  # as published: the vocabulary without the added tokens, which stand in their own list
        described["model"]["vocab"] = vocab
        for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
            (folder / name).unlink()
        random.Random(0).shuffle(described["added_tokens"])
        write_json(folder / "tokenizer.json", described)
    tokenizer = load_tokenizer(folder)
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in tokens} == {t: i for t, (i, _) in tokens.items()}
    for text, (i, special) in tokens.items():
        assert tokenizer(f"Tom{text}12", add_special_tokens=False)["input_ids"].count(i) == 1
        shown = tokenizer.decode([i], skip_special_tokens=True)
        assert shown == ("" if special and route != "added" else text)
    assert tokenizer.decode(tokenizer("Tom has 12 apples")["input_ids"]) == "Tom has 12 apples"


def test_ordinary_text_never_becomes_an_added_token(tmp_path: Path) -> None:
    """`<tool_call>` is a word of the vocabulary now; only itself leads to it."""
    write_tokenizer(tmp_path, "dream")
    tokenizer, ids = load_tokenizer(tmp_path), set(special_ids("dream").values())
    for text in ("tool_call", "<tool_cal", "< tool_call>", "<|im_end |>", "<|mask"):
        assert not ids & set(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_two_files_that_disagree_are_an_error_that_names_both(tmp_path: Path, kind: str) -> None:
    write_tokenizer(tmp_path, kind)
    mask = mask_of(kind)
    ids = special_ids(kind)
    listed = tmp_path / "added_tokens.json"
    sources = ["added_tokens.json", "tokenizer_config.json"] if kind == "dream" else ["added_tokens.json", "tokenizer.json"]
    write_json(listed, {mask: ids[mask] + 1})  # the text at another id
    with pytest.raises(ValueError, match=f"(?s){'.*'.join(sources)}|{'.*'.join(sources[::-1])}"):
        load_tokenizer(tmp_path)
    write_json(listed, {"<|other|>": ids[mask]})  # the id with another text
    with pytest.raises(ValueError, match=f"(?s){'.*'.join(sources)}|{'.*'.join(sources[::-1])}"):
        load_tokenizer(tmp_path)
    write_json(listed, {"<|other|>": 7})  # the id of a word
    with pytest.raises(ValueError, match=r"added_tokens.json has the added token '<\|other\|>' at 7, the vocabulary of"):
        load_tokenizer(tmp_path)


def test_a_token_that_one_file_lacks_comes_from_the_other(tmp_path: Path) -> None:
    """tokenizer.json without the mask, as a library that does not know it would save it."""
    write_checkpoint(tmp_path, "v2")
    edit(tmp_path / "tokenizer.json", lambda t: t["added_tokens"].pop())
    model = load(tmp_path)
    assert model.spec.mask_id == special_ids("v2")["|<MASK>|"] == model.tokenizer.convert_tokens_to_ids("|<MASK>|")


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


# --- config.json: what changes the network is never ignored ---------------------------------------------------------

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


def test_a_tensor_says_which_network_it_is_from(tmp_path: Path) -> None:
    for name, what in (("model.layers.0.self_attn.q_norm.weight", "norms on queries and keys"), ("x.g.qweight", "GPTQ")):
        write_checkpoint(tmp_path / what[:4], "dream")
        path = tmp_path / what[:4] / "model.safetensors"
        save_file({**load_file(path), name: torch.ones(8).to(torch.int32 if "qweight" in name else torch.float32)}, path)
        with pytest.raises(ValueError, match=f"unexpected tensor '{name}'.*{what}"):
            load(tmp_path / what[:4])


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


# --- weights --------------------------------------------------------------------------------------------------------


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


# --- entries of a folder that are no files, texts at one id, names with two values ----------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "link to nothing", "link to itself"])
def test_an_entry_that_is_no_file_is_named_and_never_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    """A pipe would be waited for without end, /dev/zero read without end, and a link to nothing passed over."""
    write_checkpoint(tmp_path, "dream")
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "link to nothing": "nowhere", "link to itself": name}[kind])
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")):
        load(tmp_path)


@pytest.mark.parametrize("kind, name", [("dream", "vocab.json"), ("v2", "tokenizer.json")])
@pytest.mark.parametrize("value", ["twice", 2**32 - 1, -1, 1.0, True, "7", None])
def test_a_vocabulary_has_one_text_at_an_id(tmp_path: Path, kind: str, name: str, value: Any) -> None:
    write_checkpoint(tmp_path, kind)

    def change(described: dict[str, Any]) -> None:
        vocab = described["model"]["vocab"] if kind == "v2" else described
        vocab["zz"] = vocab["a"] if value == "twice" else value

    edit(tmp_path / name, change)
    with pytest.raises(ValueError, match=f"{name}: the token.*'zz'"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"])
def test_a_name_with_two_values_is_refused(tmp_path: Path, name: str) -> None:
    """Readers of JSON differ in which of the two counts; the same value twice is no matter."""
    write_checkpoint(tmp_path, "dream")
    path = tmp_path / name
    text = path.read_text(encoding="utf-8")
    first, value = next(iter(json.loads(text).items()))
    path.write_text(f"{text[:-1]}, {json.dumps(first)}: {json.dumps(value)}}}", encoding="utf-8")
    load(tmp_path)
    path.write_text(f"{text[:-1]}, {json.dumps(first)}: 77}}", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} is not valid JSON .the name {first!r} is there twice"):
        load(tmp_path)


@pytest.mark.parametrize("hole", ["T", "Ã", "¿", "ð"])
def test_a_vocabulary_that_loses_characters_is_called_so(tmp_path: Path, hole: str) -> None:
    """A byte that a vocabulary lacks is left out of every prompt by the library, without a word."""
    write_checkpoint(tmp_path, "dream")
    edit(tmp_path / "vocab.json", lambda vocab: vocab.update({"<hole>": vocab.pop(hole)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.warns(UserWarning, match="the tokenizer has no tokens for .*prompts lose them"):
        load(tmp_path)


def test_a_vocabulary_by_bytes_without_its_split_is_called_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "v2")
    edit(tmp_path / "tokenizer.json", lambda described: described.update(pre_tokenizer=None))
    with pytest.warns(UserWarning, match="the tokenizer has no tokens for .*prompts lose them"):
        load(tmp_path)


TRAINING = {
    "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
    },
}


@pytest.mark.parametrize("left", ["truncation", "padding", "dropout"])
def test_what_a_training_left_in_the_tokenizer_changes_no_prompt(tmp_path: Path, left: str) -> None:
    write_tokenizer(tmp_path, "v2")
    text = "Tom has 12 apples and the lazy dog"
    expected = load_tokenizer(tmp_path)(text)["input_ids"]
    part = {left: TRAINING[left]} if left in TRAINING else {}
    edit(tmp_path / "tokenizer.json", lambda t: (t.update(part), t["model"].update({} if part else {"dropout": 0.9})))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that characters are lost, since the text was cut
        tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.backend_tokenizer.encode(text).ids == tokenizer(text)["input_ids"] == expected


@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece"])
def test_a_text_that_a_vocabulary_cannot_encode_is_named(tmp_path: Path, kind: str) -> None:
    """Its unknown token is missing: the library then raises a bare Exception for every other word."""
    write_checkpoint(tmp_path, "v2")
    words = {"type": kind, "vocab": {"Tom": 0, "has": 1}, "unk_token": "[UNK]"}
    words |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100} if kind == "WordPiece" else {}
    edit(tmp_path / "tokenizer.json", lambda t: t.update(model=words))
    model = load(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer has no tokens for 'apples'"):
        fastdllm.generate(model, "apples", gen_length=4)


@pytest.mark.parametrize("kind", sorted(ADDED))
def test_a_whole_vocabulary_loses_nothing(tmp_path: Path, kind: str) -> None:
    write_tokenizer(tmp_path, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"decoders": {"x": {"drafts": [[-1]], "forwards": []}}}',
        '{"decoders": {"x": {"drafts": [[1e999]], "forwards": []}}}',
    ],
)
def test_a_damaged_file_of_drafts_is_named(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path, "llada")
    (tmp_path / "drafts.json").write_text(text)
    with pytest.raises(ValueError, match=r"drafts\.json"):
        load(tmp_path)


# --- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype",
    [
        *(("bf16", torch.bfloat16), ("fp16", torch.float16), ("half", torch.float16), ("float64", torch.float64)),
        *(("torch.float32", torch.float32), ("auto", torch.bfloat16), (torch.float64, torch.float64)),
    ],
)
def test_spellings_of_a_number_format(tmp_path: Path, name: Any, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, "dream", torch_dtype="bfloat16")
    assert fastdllm.load(str(tmp_path), device="cpu", dtype=name).dtype == dtype


@pytest.mark.parametrize("dtype", ["float8", "int8", 16, torch.int64, ["bf16"]])
def test_a_wrong_number_format_is_named(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype=.* is unknown; allowed are auto, float32"):
        fastdllm.load("tiny-sudoku", device="cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta", "cuda:-3", 3.5, ["cpu"]])
def test_a_device_that_is_not_here_is_named(device: Any) -> None:
    with pytest.raises(ValueError, match=r"device=.* cannot be used here .*allowed are auto, cpu"):
        fastdllm.load("tiny-sudoku", device=device)


def test_auto_is_the_default_device() -> None:
    assert fastdllm.load("tiny-sudoku", device="auto").device == fastdllm.load("tiny-sudoku").device


@pytest.mark.parametrize(
    "option, hint", [("torch_dtype", "use dtype="), ("device_map", "use device="), ("treshold", "allowed are")]
)
def test_options_of_other_libraries_get_a_hint(option: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"load has no option '{option}'; {hint}"):
        fastdllm.load("tiny-sudoku", **{option: "x"})


@pytest.mark.parametrize("name", ["GSAI-ML/LLaDA-8B-Instruct", "checkpoints/llada-typo", "a b/c", "x/" + "y" * 200])
def test_a_model_that_cannot_be_fetched_is_one_line(name: str) -> None:
    """The tests run offline."""
    with pytest.raises(FileNotFoundError) as caught:
        fastdllm.load(name, device="cpu")
    message = str(caught.value)
    assert "\n" not in message and name in message and "tiny-llada" in message
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "name", ["", "nothing", "/no/such/folder", "a/b/c", "x\0y", "~/", 5, None, ["tiny-llada"], "z" * 5000]
)
def test_anything_else_is_no_model(name: Any) -> None:
    with pytest.raises((ValueError, OSError), match="model"):
        fastdllm.load(name, device="cpu")


def test_an_adapter_folder_is_not_a_model(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(FileNotFoundError, match="holds a LoRA adapter, not a model"):
        load(tmp_path)


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_clone_without_git_lfs_says_so(tmp_path: Path) -> None:
    for kind in KINDS:
        write_checkpoint(tmp_path / kind, kind)
        for path in sorted((tmp_path / kind).iterdir()):
            if path.name == "special_tokens_map.json" and kind == "llada":
                continue
            whole = path.read_bytes()
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
            with pytest.raises(ValueError, match=f"{path.name}: a git-lfs pointer .*git lfs pull"):
                load(tmp_path / kind)
            path.write_bytes(whole)


@pytest.mark.parametrize("gone", ["merges.txt", "vocab.json"])
def test_half_a_tokenizer_is_an_error(tmp_path: Path, gone: str) -> None:
    write_checkpoint(tmp_path, "dream")
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=gone):
        load(tmp_path)


def test_a_sentencepiece_model_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "dream", tokenizer=False)
    (tmp_path / "tokenizer.model").write_bytes(b"\0\1")
    with pytest.raises(FileNotFoundError, match=r"has tokenizer.model, but no tokenizer.json"):
        load(tmp_path)


def test_chat_templates_in_a_list(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "dream")
    message = [{"role": "user", "content": "hi"}]

    def render(template: Any) -> str:
        edit(tmp_path / "tokenizer_config.json", lambda c: c.update(chat_template=template))
        return load_tokenizer(tmp_path).apply_chat_template(message, tokenize=False)

    tools, plain = {"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ messages[0]['content'] }}!"}
    assert render([tools, plain]) == "hi!" == render([plain])
    assert render([tools]) == "t"
    unnamed = [{"name": ["default"], "template": "r"}, {"name": {}, "template": "r"}]
    for bad in ([tools, {"name": "rag", "template": "r"}], unnamed, [{"name": "default"}], [], 5, {"a": 1}):
        with pytest.raises(ValueError, match=r"tokenizer_config.json.*chat_template"):
            render(bad)


NAMED = ["tokenizer_config", "added_tokens", "special_tokens_map"]
READ = {
    "llada": ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"],
    "dream": [
        "config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    ],
}
BROKEN = {
    "empty": b"",
    "null": b"null",
    "list": b"[1]",
    "number": b"5",
    "text": b'"x"',
    "torn": b'{"a": ',
    "not utf-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("kind, name", [(k, n) for k, names in READ.items() for n in names])
@pytest.mark.parametrize("how", [*BROKEN, "folder"])
def test_a_broken_file_is_named(tmp_path: Path, kind: str, name: str, how: str) -> None:
    write_checkpoint(tmp_path, kind, shards=2 if kind == "llada" else 1)
    path = tmp_path / name
    path.unlink()
    if how == "folder":
        path.mkdir()
    else:
        path.write_bytes(BROKEN[how])
    if (name, how) == ("merges.txt", "empty"):
        load(tmp_path)  # a vocabulary without merges is one
        return
    with pytest.raises((ValueError, OSError), match=name):
        load(tmp_path)


def damaged(value: Any, draw: random.Random) -> Any:
    """The same JSON value with one thing changed, somewhere inside."""
    junk = [None, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "", "x", [], [1], {}, {"a": 1}, True, False, "\ud800"]
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value, key=str))
        change = draw.choice(["inside", "inside", "inside", "gone", "renamed"])
        rest = {k: v for k, v in value.items() if k != key}
        if change == "gone":
            return rest
        return {
            **rest,
            (f"{key}x" if change == "renamed" else key): value[key] if change == "renamed" else damaged(value[key], draw),
        }
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        return [*value[:at], damaged(value[at], draw), *value[at + 1 :]]
    return draw.choice(junk)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("whole") / kind for kind in KINDS}
    for kind, folder in folders.items():
        write_checkpoint(folder, kind, shards=2 if kind == "v2" else 1)
    return folders


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_an_error_that_names_the_file_or_changes_nothing(
    tmp_path: Path, whole: dict[str, Path], kind: str, seed: int
) -> None:
    """One byte, one cut or one JSON value, in any file: refused with a name, or the model of the whole folder."""
    draw = random.Random(seed)
    folder = tmp_path / "m"
    shutil.copytree(whole[kind], folder)
    path = folder / draw.choice(sorted(p.name for p in folder.iterdir()))
    content = path.read_bytes()
    how = draw.choice(["value", "value", "cut", "bytes"] if path.suffix == ".json" else ["cut", "bytes"])
    if how == "value":
        path.write_text(json.dumps(damaged(json.loads(content), draw)), encoding="utf-8")
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        at = draw.randrange(min(len(content), 4000))
        path.write_bytes(content[:at] + bytes(draw.randrange(256) for _ in range(3)) + content[at + 3 :])
    try:
        model = load(folder)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error) or path.name in str(error), error
        return
    good = load(whole[kind])
    assert model.spec.mask_id == good.spec.mask_id
    assert model.network.embed.weight.shape == good.network.embed.weight.shape
    for text in ADDED[kind]:
        i = model.tokenizer.get_vocab().get(text) if model.tokenizer else None
        assert i in (None, special_ids(kind)[text])
    # What still loads must still run.
    out = fastdllm.generate(model, [torch.tensor([5, 6, 7])], gen_length=8, block_length=8)
    assert len(out.sequences[0]) <= 11


# --- other programs read what ships ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_names())
def test_transformers_reads_the_shipped_tokenizers(name: str) -> None:
    """`TokenizersBackend` is a class of transformers 5 only; these names are known to 4 and 5."""
    transformers = pytest.importorskip("transformers")
    kind = json.loads((TINY / name / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert kind in ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "DreamTokenizer")
    if kind == "DreamTokenizer":
        return  # published with code of its own
    assert hasattr(transformers, kind)
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(TINY / name), load_tokenizer(TINY / name)
    assert theirs.mask_token_id == ours.mask_token_id and len(theirs) == len(ours)
    for text in ("Tom has 12 apples", "naïve café <|mask|>|<MASK>|<|im_end|> x"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text, add_special_tokens=False)["input_ids"]


def test_a_link_out_of_the_folder_is_how_the_hub_stores_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "blobs", "llada")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        os.symlink(path, tmp_path / "snapshot" / path.name)
    load(tmp_path / "snapshot")


def test_ids_without_a_token_are_never_predicted(tmp_path: Path) -> None:
    """Holes between added tokens too, which the number of tokens does not show."""
    write_checkpoint(tmp_path, "dream")
    hole = special_ids("dream")["<|box_end|>"]
    edit(tmp_path / "added_tokens.json", lambda c: c.pop("<|box_end|>"))
    edit(tmp_path / "tokenizer_config.json", lambda c: c["added_tokens_decoder"].pop(str(hole)))
    model = load(tmp_path)
    assert model.banned[hole] and not model.banned[hole - 1] and not model.banned[hole + 1]
