# SPDX-License-Identifier: Apache-2.0
"""The trained network: its mask, its loss and gradients, and the folders it is read from and written to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

import fastdllm
from fastdllm.training.checkpoint import MASK_TOKEN, load_for_training, read_config, save_tokenizer, tensor_shapes
from fastdllm.training.collator import Collator, Row
from fastdllm.training.masks import dense_mask
from fastdllm.training.model import Fast_dLLM_QwenForCausalLM
from fastdllm.training.objective import (
    IGNORE,
    choose_masked,
    complementary_views,
    draw_noise,
    noisy_and_clean,
)
from fastdllm.training.samples import Sample
from tests.examples import examples
from tests.training.conftest import tiny_qwen2

BLOCK = 8


def random_sample(length: int, prompt: int) -> Sample:
    ids = torch.randint(3, 259, (length,), dtype=torch.int32).numpy()
    labels = ids.copy()
    labels[:prompt] = IGNORE
    return Sample(ids, labels)


def make_batch(rows: list[list[Sample]], mask_id: int, width: int | None = None) -> dict[str, Tensor]:
    batch = Collator(mask_id, width)([Row(i, row) for i, row in enumerate(rows)])
    noise = draw_noise(*batch["labels"].shape, torch.Generator().manual_seed(1))
    batch["masked"] = choose_masked(batch["labels"], batch["position_ids"], BLOCK, noise)
    del batch["index"]
    return batch


@pytest.fixture
def model(qwen2: Path) -> Fast_dLLM_QwenForCausalLM:
    return load_for_training(str(qwen2), BLOCK)[0]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return make_batch([[random_sample(24, 5), random_sample(13, 4)], [random_sample(30, 9)]], mask_id=259)


def hand_written_states(model: Qwen2Model, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Qwen2 with attention as plain matrix products. ids, positions: [B, N]; mask: [B, 1, N, N]."""
    hidden = model.embed_tokens(ids)
    cos, sin = model.rotary_emb(hidden, positions)
    for layer in model.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) / attention.head_dim**0.5
        mixed = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.norm(hidden)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_loss_equals_hand_written_attention_and_a_loop_over_targets(
    model: Fast_dLLM_QwenForCausalLM, batch: dict[str, Tensor], training: bool
) -> None:
    ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
    loss = model.train(training)(**batch).loss
    noisy = complementary_views(ids, labels, batch["masked"], 259)
    mask = dense_mask(positions, batch["documents"], BLOCK).repeat(2, 1, 1, 1)
    states = hand_written_states(model.model, noisy_and_clean(noisy, ids), positions.repeat(2, 2), mask)
    terms = [
        -(states[view, i - 1] @ model.lm_head.weight.T).log_softmax(-1)[labels[view % 2, i]]
        for view in range(4)
        for i in range(1, ids.shape[1])
        if labels[view % 2, i] != IGNORE and noisy[view, i] == 259
    ]
    torch.testing.assert_close(loss, torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


def test_a_packed_row_has_the_loss_of_its_samples_alone(model: Fast_dLLM_QwenForCausalLM) -> None:
    """The document mask, the positions and row padding together: company changes nothing."""
    samples = [random_sample(24, 5), random_sample(16, 4), random_sample(8, 2)]
    packed = make_batch([samples], 259, width=56)
    start, total = 0, torch.zeros(())
    for one in samples:
        alone = make_batch([[one]], 259)
        alone["masked"] = packed["masked"][:, start : start + len(one.ids)]
        total += model(**alone, num_items_in_batch=1).loss
        start += len(one.ids)
    torch.testing.assert_close(model(**packed, num_items_in_batch=1).loss, total, rtol=1e-5, atol=1e-4)


def test_activation_checkpointing_keeps_loss_and_gradients(
    model: Fast_dLLM_QwenForCausalLM, batch: dict[str, Tensor]
) -> None:
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: recomputed.append(1))
    saved = gradients()
    assert len(recomputed) == 2, "the layer was not run again in the backward pass"
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, msg=name)


def test_every_embedding_row_learns(model: Fast_dLLM_QwenForCausalLM) -> None:
    """config.pad_token_id is <|im_end|> here, as published; an embedding would not learn its padding row."""
    ids = torch.tensor([3, 4, 5, 2, 6, 7], dtype=torch.int32).numpy()
    labels = ids.copy()
    labels[:5] = IGNORE
    model.lm_head = torch.nn.Linear(32, 264, bias=False)  # a tied head would give the row a gradient by itself
    model(**make_batch([[Sample(ids, labels)]], 259)).loss.backward()
    assert model.model.embed_tokens.weight.grad[2].abs().sum() > 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_mask_takes_a_free_row_without_resizing(tmp_path: Path, tied: bool) -> None:
    model, tokenizer = load_for_training(str(tiny_qwen2(tmp_path, tied=tied)))
    assert tokenizer.convert_tokens_to_ids(MASK_TOKEN) == model.config.mask_token_id == 259
    assert model.config.vocab_size == model.model.embed_tokens.num_embeddings == 264
    assert model.config.bd_size == 32
    original = Qwen2ForCausalLM.from_pretrained(tmp_path).state_dict()
    assert original.keys() == model.state_dict().keys()
    assert all(torch.equal(original[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_embedding_grows_when_no_row_is_free(tmp_path: Path, tied: bool) -> None:
    model, _ = load_for_training(str(tiny_qwen2(tmp_path, vocab_size=259, tied=tied)), BLOCK)
    assert model.config.vocab_size == model.model.embed_tokens.num_embeddings == 260
    assert model.lm_head.out_features == 260
    batch = make_batch([[random_sample(16, 3)]], 259)
    assert torch.isfinite(model(**batch).loss)


def test_saved_folder_has_the_published_format_and_equal_logits(
    model: Fast_dLLM_QwenForCausalLM, qwen2: Path, tmp_path: Path
) -> None:
    _, tokenizer = load_for_training(str(qwen2))
    model.save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "Fast_dLLM_Qwen"
    assert config["architectures"] == ["Fast_dLLM_QwenForCausalLM"]
    assert config["bd_size"] == BLOCK
    assert config["rope_theta"] == 10000.0
    assert config["torch_dtype"] == "float32"
    assert config["auto_map"]["AutoModelForCausalLM"].endswith("modeling.Fast_dLLM_QwenForCausalLM")
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(MASK_TOKEN) == 259

    ids = torch.randint(3, 259, (2, 11))
    model.eval()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, Fast_dLLM_QwenForCausalLM)
    assert torch.equal(again(ids).logits, model(ids).logits)
    resumed, _ = load_for_training(str(tmp_path))
    assert resumed.config.bd_size == BLOCK
    assert resumed.config.mask_token_id == 259
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_saved_folder_loads_in_fastdllm(model: Fast_dLLM_QwenForCausalLM, qwen2: Path, tmp_path: Path) -> None:
    _, tokenizer = load_for_training(str(qwen2))
    model.save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    loaded = fastdllm.load(str(tmp_path), device="cpu")
    assert loaded.spec.family == "fast_dllm_v2"
    assert (loaded.spec.block_causal, loaded.spec.mask_id, loaded.spec.shift) == (BLOCK, 259, 1)
    assert loaded.tokenizer.chat_template == tokenizer.chat_template


OLD = {"rope_parameters": None, "rope_theta": 1e4}  # where transformers 4 has the base


def with_config(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Put a copy of a checkpoint into `folder`, with another config.json."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({**OLD, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'; supported are default"),
        ({**OLD, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_type='linear'; supported are default"),
        ({**OLD, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type='dynamic'; supported are default"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type='yarn'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": False}, r"differs from transformers' Qwen2 in the tensors .*k_proj\.bias"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"eos_token_id": 70}, "eos_token_id=.*70 is the text 'd', no control token"),
    ],
)
def test_what_decoding_would_refuse_or_read_as_another_network_is_not_trained(
    qwen2: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """transformers trains some of it as asked and some of it not at all, and the saved folder says nothing of either."""
    with_config(qwen2, tmp_path, lambda fields: fields | change)
    with pytest.raises(ValueError, match=message) as refused:
        load_for_training(str(tmp_path))
    assert str(tmp_path) in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({"rope_scaling": None}, 1e4),
        ({**OLD, "rope_scaling": {"type": "default"}}, 1e4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5),
        ({"sliding_window": 4096, "max_window_layers": 2, "use_mrope": False, "hidden_act": "silu"}, 1e4),
    ],
)
def test_what_says_as_usual_is_trained_and_saved_as_it_was(
    qwen2: Path, tmp_path: Path, change: dict[str, object], theta: float
) -> None:
    with_config(qwen2, tmp_path, lambda fields: fields | change)
    model, tokenizer = load_for_training(str(tmp_path), BLOCK)
    model.save_pretrained(tmp_path / "saved")
    save_tokenizer(tokenizer, tmp_path / "saved")
    loaded = fastdllm.load(str(tmp_path / "saved"), device="cpu")
    assert loaded.spec.rope_theta == theta and loaded.spec.stretch is None


@pytest.mark.parametrize("names", [("rope_theta", "rope_parameters"), ("rms_norm_eps",), ("max_position_embeddings",)])
def test_what_a_config_leaves_out_is_trained_and_saved_as_transformers_fills_it_in(
    qwen2: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    with_config(qwen2, tmp_path, lambda fields: {name: value for name, value in fields.items() if name not in names})
    model, tokenizer = load_for_training(str(tmp_path), BLOCK)
    model.save_pretrained(tmp_path / "saved")
    save_tokenizer(tokenizer, tmp_path / "saved")
    spec = fastdllm.load(str(tmp_path / "saved"), device="cpu").spec
    assert (spec.rope_theta, spec.max_length) == (1e4, model.config.max_position_embeddings)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)


def cut(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(7)


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.bias"][3] = float("nan")


def integers(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int64)


DAMAGE = {
    drop: r"lacks tensors: model\.layers\.0\.mlp\.up_proj\.weight",
    add: r"unknown tensors: model\.layers\.0\.self_attn\.q_norm\.weight",
    cut: r"misshapen tensors: model\.norm\.weight",
    not_a_number: r"NaN or infinite weights in model\.layers\.1\.self_attn\.k_proj\.bias",
    integers: r"no floating-point numbers: model\.norm\.weight",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_damaged_weights_are_refused_by_name(tmp_path: Path, damage: Callable[..., None], sharded: bool) -> None:
    """transformers would draw what is missing at random and train on."""
    folder = tiny_qwen2(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    name = "model-00001-of-00001.safetensors" if sharded else "model.safetensors"
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / name, metadata={"format": "pt"})
    if sharded:
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=DAMAGE[damage]):
        load_for_training(str(folder))


@given(share=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_torn_weights_are_refused_by_name(qwen2: Path, tmp_path: Path, share: float) -> None:
    whole = (qwen2 / "model.safetensors").read_bytes()
    shutil.copytree(qwen2, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        load_for_training(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 10**9), ("num_hidden_layers", 3), ("num_hidden_layers", 10**9), ("intermediate_size", 10**9)],
)
def test_sizes_that_the_weights_do_not_have_take_no_memory(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: int
) -> None:
    """config.json is compared with the headers of the weights before anything is loaded."""
    shutil.copytree(qwen2, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Fast_dLLM_QwenForCausalLM, "from_pretrained", loaded)
    with pytest.raises(ValueError, match=r"(misshapen|lacks) tensors|layer_types contradicts"):
        load_for_training(str(tmp_path))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = tiny_qwen2(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        save_file(tensors, folder / name, metadata={"format": "pt"})
    half = dict(zip(tensors, names * len(tensors), strict=False))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": half}))
    with pytest.raises(ValueError, match="another file has as well"):
        load_for_training(str(folder))


def test_bad_block_is_refused(qwen2: Path) -> None:
    with pytest.raises(ValueError, match="bd_size=0"):
        load_for_training(str(qwen2), 0)


@pytest.mark.gpu
def test_flex_attention_has_the_loss_and_gradients_of_sdpa(tmp_path: Path) -> None:
    qwen2 = tiny_qwen2(tmp_path, heads=2)  # on a GPU flex attention takes heads of 16 and more
    batch = make_batch([[random_sample(100, 5), random_sample(60, 4)], [random_sample(140, 9)]], 259, width=192)
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    found = {}
    for attention in ("sdpa", "flex_attention"):
        model = load_for_training(str(qwen2), BLOCK, attention=attention)[0].cuda().train()
        loss = model(**batch).loss
        loss.backward()
        found[attention] = loss.detach(), model.model.embed_tokens.weight.grad
    torch.testing.assert_close(found["flex_attention"], found["sdpa"], atol=1e-4, rtol=1e-3)


VALUES = st.sampled_from(["x", "", -1, 0, 1, 3, 10**9, 1e308, float("nan"), 1.5, [], [1], {}, {"a": 1}, None, True, False])
FIELDS = [
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
]
FIELDS += ["rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling", "tie_word_embeddings", "layer_types", "bd_size"]
FIELDS += [
    "quantization_config",
    "attn_implementation",
    "id2label",
    "hidden_act",
    "eos_token_id",
    "pad_token_id",
    "head_dim",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(150))
@given(fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2))
def test_a_wild_field_of_a_config_is_a_model_or_an_error_that_names_the_file(
    qwen2: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    config = json.loads((qwen2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    try:
        read_config(tmp_path, None, len(tensor_shapes(qwen2)))
    except ValueError as error:
        assert str(tmp_path) in str(error) or "bd_size=" in str(error)
        assert len(str(error).splitlines()) == 1


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", text) for text in ("", "[]", "null", "[" * 100_000, '{"model_type": "qwen2", "model_type": "x"}')]
    + [
        (INDEX, text)
        for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": "../x"}}')
    ],
)
def test_a_damaged_file_beside_the_weights_is_named(qwen2: Path, tmp_path: Path, name: str, text: str) -> None:
    folder = shutil.copytree(qwen2, tmp_path / "model")
    (folder / name).write_text(text)
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")):
        load_for_training(str(folder))
