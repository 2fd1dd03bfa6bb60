# SPDX-License-Identifier: Apache-2.0
"""The network computes what transformers' own Qwen2 and Llama compute from the same tensors, to 1e-5 in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm.forward import Window
from tests.published_checkpoints import FFN, HEADS, KV_HEADS, LAYERS, VOCAB, WIDTH, write_checkpoint

T = 21


def our_logits(model: fastdllm.Model, ids: Tensor, passes: list[tuple[int, int]] | None = None) -> Tensor:
    """Logits [B, T, V] of whole sequences, computed in the given passes of positions (default: one)."""
    rows, length = ids.shape
    store = model.network.new_store(rows, length + 1)
    out = []
    for start, stop in passes or [(0, length)]:
        pos = torch.arange(start, stop).expand(rows, -1)
        grid = model.spec.block_causal
        limit = ((pos // grid + 1) * grid).clamp(max=stop) if grid else torch.full_like(pos, length)
        window = Window(torch.arange(rows), pos, limit, length)
        out.append(model.network.logits(model.network(ids[:, start:stop], window, store)))
    return torch.cat(out, 1)


def additive(visible: Tensor) -> Tensor:
    """[T, T] bool -> the float mask [1, 1, T, T] that transformers adds to the scores."""
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


def block_causal(size: int) -> Tensor:
    block = torch.arange(T) // size
    return block[:, None] >= block[None, :]


@pytest.mark.parametrize("family, style", [("dream", 4), ("dream", 5), ("v2", 4), ("v2", 5)])
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": HEADS}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}], ids=str
)
def test_dream_and_v2_are_qwen2(tmp_path: Path, family: str, style: int, changes: dict[str, Any]) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tensors = write_checkpoint(tmp_path, family, style=style, tokenizer=False, **_ids(family), **changes)
    model = fastdllm.load(str(tmp_path), device="cpu")
    fields = {
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attn_implementation": "eager",
        **changes,
    }
    theirs = Qwen2ForCausalLM(Qwen2Config(**fields)).eval()
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    visible = block_causal(8) if family == "v2" else torch.ones(T, T, dtype=torch.bool)
    ids = torch.randint(0, 380, (3, T))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=additive(visible)).logits
        torch.testing.assert_close(our_logits(model, ids), expected, atol=1e-5, rtol=1e-5)
        if family == "v2":
            in_blocks = our_logits(model, ids, [(0, 8), (8, 16), (16, T)])
            torch.testing.assert_close(in_blocks, expected, atol=1e-5, rtol=1e-5)


def _ids(family: str) -> dict[str, int]:
    """Without a tokenizer the ids come from config.json; v2 publishes its mask in the tokenizer only."""
    return {"mask_token_id": VOCAB - 1} if family == "v2" else {}


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": HEADS}, {"n_kv_heads": 1}, {"include_qkv_bias": True}, {"weight_tying": True}], ids=str
)
def test_llada_is_llama_read_both_ways(tmp_path: Path, changes: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors = write_checkpoint(tmp_path, "llada", tokenizer=False, **changes)
    model = fastdllm.load(str(tmp_path), device="cpu")
    fields = {
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": changes.get("n_kv_heads", KV_HEADS),
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": changes.get("include_qkv_bias", False),
        "tie_word_embeddings": changes.get("weight_tying", False),
        "attn_implementation": "eager",
    }
    theirs = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in LLADA_TO_LLAMA:
            name = name.replace(old, new)
        renamed[name] = tensor
    if changes.get("include_qkv_bias"):  # Llama's bias includes the output projection, LLaDA's does not
        renamed |= {f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(WIDTH) for i in range(LAYERS)}
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    ids = torch.randint(0, 380, (3, T))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=additive(torch.ones(T, T, dtype=torch.bool))).logits
        torch.testing.assert_close(our_logits(model, ids), expected, atol=1e-5, rtol=1e-5)


LLADA_TO_LLAMA = [
    ("model.transformer.wte", "model.embed_tokens"),
    ("model.transformer.ln_f", "model.norm"),
    ("model.transformer.ff_out", "lm_head"),
    ("model.transformer.blocks.", "model.layers."),
    ("attn_norm", "input_layernorm"),
    ("ff_norm", "post_attention_layernorm"),
    ("attn_out", "self_attn.o_proj"),
    ("q_proj", "self_attn.q_proj"),
    ("k_proj", "self_attn.k_proj"),
    ("v_proj", "self_attn.v_proj"),
    ("ff_proj", "mlp.gate_proj"),
    ("up_proj", "mlp.up_proj"),
    ("ff_out", "mlp.down_proj"),
]


def test_a_pass_over_some_positions_equals_the_whole_when_nothing_changed(tmp_path: Path) -> None:
    """Rotated keys stay in the store; queries of any window get their own positions."""
    write_checkpoint(tmp_path, "llada", tokenizer=False)
    model = fastdllm.load(str(tmp_path), device="cpu")
    ids = torch.randint(0, 380, (2, T))
    store = model.network.new_store(2, T)
    rows = torch.arange(2)

    def run(pos: Tensor) -> Tensor:
        window = Window(rows, pos, torch.full_like(pos, T), T)
        return model.network(ids.gather(1, pos), window, store)

    whole = run(torch.arange(T).expand(2, -1))
    pos = torch.stack([torch.arange(5, 12), torch.arange(11, 18)])
    torch.testing.assert_close(run(pos), whole.gather(1, pos[..., None].expand(-1, -1, WIDTH)), atol=1e-5, rtol=1e-5)
