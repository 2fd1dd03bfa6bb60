# SPDX-License-Identifier: Apache-2.0
"""Families in transformers' layout compute what its own Qwen3, Qwen2, Llama and Ministral do, under the family's mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdllm
from fastdllm.forward import Window
from fastdllm.models import FAMILIES
from fastdllm.models.rope import frequencies
from fastdllm.models.spec import Stretch
from tests.models.test_networks import additive, block_causal, our_logits
from tests.published_checkpoints import VOCAB, qwen2_config, special_ids, write_checkpoint

T = 21
KINDS = ["llada_moe", "llada2_moe", "sdar", "a2d-qwen3", "a2d-qwen2", "a2d-llama", "stable_diffcoder", "nemotron"]
BASES = {
    "llada_moe": "Qwen3Moe",
    "llada2_moe": "Glm4Moe",
    "sdar": "Qwen3",
    "a2d-qwen3": "Qwen3",
    "a2d-qwen2": "Qwen2",
    "nemotron": "Ministral3",
}
IGNORED = {"model_type", "architectures", "block_size", "mask_token_id", "dlm_paradigm", "ar_loss_weight", "rope_scaling"}
IGNORED |= {"moe_layer_freq", "expert_intermediate_size", "norm_topk_prob", "qk_layernorm"}


def theirs(kind: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """transformers' own network of the family's base, with the same tensors."""
    import transformers

    base = BASES.get(kind, "Llama")
    fields = {k: v for k, v in config.items() if v is not None and (k not in IGNORED or k == "rope_scaling")}
    if base == "Qwen3Moe":  # with OLMoE's weights, which do not add up to 1
        fields |= {"moe_intermediate_size": config["expert_intermediate_size"], "norm_topk_prob": False}
        fields |= {"head_dim": config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])}
    if base == "Glm4Moe":
        fields |= {"n_routed_experts": fields.pop("num_experts"), "n_shared_experts": fields.pop("num_shared_experts")}
        fields |= {"use_qk_norm": True, "attention_bias": fields.pop("use_qkv_bias")}
        tensors = unfused(tensors, config)
    if not hasattr(transformers, f"{base}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {base}")
    if transformers.__version__.startswith("4."):  # version 5 put the rotation's fields into one
        rope = dict(fields.pop("rope_parameters", {}))
        fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope} if rope else {}
    make = getattr(transformers, f"{base}Config")
    network = getattr(transformers, f"{base}ForCausalLM")(make(**fields, attn_implementation="eager")).eval()
    renamed = {n.replace("encoder.", "model.").replace("diffusion_head", "lm_head"): t for n, t in tensors.items()}
    if any(name.endswith("experts.gate_up_proj") for name in network.state_dict()):
        renamed = stacked(renamed, config.get("num_experts", 0))
    missing, unexpected = network.load_state_dict(renamed, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    network.tie_weights()
    return network


GLM = {
    "word_embeddings": "embed_tokens",
    "attention.dense": "self_attn.o_proj",
    "gate.expert_bias": "gate.e_score_correction_bias",
}
GLM |= {"attention.query_layernorm": "self_attn.q_norm", "attention.key_layernorm": "self_attn.k_norm"}


def unfused(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """LLaDA2.x's tensors under the names of GLM-4.5, which has the same layers and a projection each for q, k and v."""
    out, d = {}, config["head_dim"]
    sizes = [d * config["num_attention_heads"], d * config["num_key_value_heads"], d * config["num_key_value_heads"]]
    for name, tensor in tensors.items():
        for old, new in GLM.items():
            name = name.replace(old, new)
        if "query_key_value" not in name:
            out[name] = tensor
            continue
        for part, rows in zip("qkv", tensor.split(sizes), strict=True):
            out[name.replace("attention.query_key_value", f"self_attn.{part}_proj")] = rows
    return out


def stacked(tensors: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The experts' tensors in one each of gate and up and of down, as transformers keeps them from version 5 on."""
    out = {n: t for n, t in tensors.items() if ".experts." not in n}
    for stem in sorted({n.partition(".experts.")[0] for n in tensors if ".experts." in n}):
        parts = {p: [tensors[f"{stem}.experts.{e}.{p}_proj.weight"] for e in range(experts)] for p in ("gate", "up", "down")}
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        out |= {f"{stem}.experts.gate_up_proj": torch.stack(both), f"{stem}.experts.down_proj": torch.stack(parts["down"])}
    return out


def check(folder: Path, kind: str, **changes: Any) -> None:
    tensors = write_checkpoint(folder, kind, tokenizer=False, **ids_without_tokenizer(kind), **changes)
    model = fastdllm.load(str(folder), device="cpu")
    size = model.spec.block_causal
    ids = torch.randint(0, VOCAB - 4, (3, T))
    visible = block_causal(size) if size else torch.ones(T, T, dtype=torch.bool)
    network = theirs(kind, qwen2_config(kind, **changes), tensors)
    with torch.no_grad():
        expected = network(ids, attention_mask=additive(visible)).logits
        torch.testing.assert_close(our_logits(model, ids), expected, atol=1e-5, rtol=1e-5)
        if size:
            in_blocks = [(i, min(i + size, T)) for i in range(0, T, size)]
            torch.testing.assert_close(our_logits(model, ids, in_blocks), expected, atol=1e-5, rtol=1e-5)


def ids_without_tokenizer(kind: str) -> dict[str, int]:
    return {} if kind == "nemotron" else {"mask_token_id": VOCAB - 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}, {"hidden_size": 48, "head_dim": 8}], ids=str
)
def test_a_family_is_its_base_under_its_mask(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    if kind in ("a2d-qwen2", "stable_diffcoder"):
        changes = {k: v for k, v in changes.items() if k != "head_dim"}
    check(tmp_path, kind, **changes)


@pytest.mark.parametrize("size", [1, 4, 8, 64])
@pytest.mark.parametrize("kind", ["sdar", "a2d-qwen3", "a2d-llama"])
def test_blocks_of_any_size(tmp_path: Path, kind: str, size: int) -> None:
    check(tmp_path, kind, block_size=size)


STRETCHES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.0},
]


@pytest.mark.parametrize("rope", STRETCHES, ids=str)
@pytest.mark.parametrize("style", [4, 5])
def test_stretched_rotations(tmp_path: Path, rope: dict[str, Any], style: int) -> None:
    place = {"rope_scaling": rope} if style == 4 else {"rope_parameters": {**rope, "rope_theta": 10000.0}}
    check(tmp_path, "a2d-llama", **place)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    plain, _ = frequencies(64, 1e4, None)
    yarn, scale = frequencies(64, 1e4, Stretch("yarn", 8.0, 4096, 1.0, 32.0, True, 1.2))
    assert scale == 1.2
    ratio = yarn / plain
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8) and (ratio[1:] <= ratio[:-1] + 1e-6).all()


def test_queries_scaled_beyond_the_trained_context_bound_it(tmp_path: Path) -> None:
    """Nemotron scales queries by 1 + b log(1 + floor(p / original)): one up to the original length, which is the context."""
    write_checkpoint(tmp_path, "nemotron")
    assert fastdllm.load(str(tmp_path), device="cpu").spec.max_length == 128


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_loads_with_its_tokenizer(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, kind, shards=2)
    model = fastdllm.load(str(tmp_path), device="cpu")
    ids = special_ids(kind)
    assert model.spec.mask_id in ids.values() and model.spec.stop_ids and model.spec.shift == 0
    assert model.tokenizer.decode([model.spec.mask_id]).lower().strip("<|>[]") in ("mask", "mask_token", "special_100")
    assert {"sdar": 4, "stable_diffcoder": 4, "llada2_moe": 32}.get(kind, 0) == model.spec.block_causal


@pytest.mark.parametrize("kind", ["sdar", "a2d-qwen3", "stable_diffcoder"])
def test_the_block_size_is_an_option_of_load(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, kind)
    spec = fastdllm.load(str(tmp_path), device="cpu", block_size=16).spec
    assert spec.block_causal == spec.defaults["block_length"] == spec.defaults["small_block_size"] == 16
    for wrong in (-1, "8", 2.5, 10**9):
        with pytest.raises(ValueError, match=f"block_size={wrong!r}"):
            fastdllm.load(str(tmp_path), device="cpu", block_size=wrong)


def test_a_family_without_a_choice_of_blocks_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"block_size=4: the blocks of .* are not a choice"):
        fastdllm.load("tiny-llada", device="cpu", block_size=4)


def test_a_plain_llama_is_no_diffusion_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "stable_diffcoder", architectures=["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="model_type='llama'; known are"):
        fastdllm.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("active", [1, 2, 6])
def test_any_number_of_experts_may_work_for_a_token(tmp_path: Path, active: int) -> None:
    check(tmp_path, "llada_moe", num_experts_per_tok=active)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64; only -1 or 0"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid'; only 'softmax'"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True; only False"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5; only 1"),
        ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq=\[0, 1\]; only a 1 for every layer"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7; it must be a whole number from 1 to 6"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe"}, "a mixture of experts .*SDARMoeForCausalLM"),
    ],
    ids=str,
)
def test_another_mixture_of_experts_is_refused_by_its_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path, "llada_moe", **change)
    with pytest.raises(ValueError, match=message):
        fastdllm.load(str(tmp_path), device="cpu")


def test_experts_decode_alike_alone_and_in_a_batch_and_in_eight_bits(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llada_moe")
    model = fastdllm.load(str(tmp_path), device="cpu")
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([9, 8, 7, 6, 5])]
    together = fastdllm.generate(model, prompts, gen_length=16, block_length=8, stop_ids=()).sequences
    for prompt, row in zip(prompts, together, strict=True):
        alone = fastdllm.generate(model, [prompt], gen_length=16, block_length=8, stop_ids=()).sequences[0]
        assert torch.equal(alone, row)
    ids = torch.randint(0, 300, (2, 12))
    for kind, allowed in (("int8", 0.05), ("int4", 0.5)):
        smaller = fastdllm.load(str(tmp_path), device="cpu", quantize=kind)
        assert smaller.network.layers[0].router.dtype == torch.float32, "the router decides between experts"
        difference = (our_logits(smaller, ids) - our_logits(model, ids)).abs().mean() / our_logits(model, ids).abs().mean()
        assert difference < allowed, kind


@pytest.mark.parametrize("kind", ["sdar", "a2d-llama", "nemotron"])
def test_biases_on_every_projection_are_refused(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, kind, attention_bias=True)
    with pytest.raises(ValueError, match="attention_bias=True; only False is supported"):
        fastdllm.load(str(tmp_path), device="cpu")


def test_every_family_is_tried_here() -> None:
    tried = {"llada", "llada_moe", "llada2_moe", "dream", "fast_dllm_v2", "sdar", "a2d", "stable_diffcoder", "nemotron"}
    assert set(FAMILIES.values()) == tried


def test_a_family_is_one_short_file() -> None:
    for name in set(FAMILIES.values()) - {"llada"}:
        path = Path(fastdllm.__file__).parent / "models" / f"{name}.py"
        assert len(path.read_text().splitlines()) <= 80, path


def causal_window(rows: int, start: int, stop: int) -> Window:
    pos = torch.arange(start, stop).expand(rows, -1)
    return Window(torch.arange(rows), pos, pos + 1, stop)


def test_nemotron_reads_its_context_causally(tmp_path: Path) -> None:
    """A causal pass over the prompt, then a block in both directions, is transformers' Ministral under that staircase."""
    tensors = write_checkpoint(tmp_path, "nemotron")
    model = fastdllm.load(str(tmp_path), device="cpu")
    ids = torch.randint(0, VOCAB - 4, (2, T))
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    visible[13:, 13:] = True
    with torch.no_grad():
        network = theirs("nemotron", qwen2_config("nemotron"), tensors)
        expected = network(ids, attention_mask=additive(visible)).logits
        store = model.network.new_store(2, T + 1)
        prompt = model.network.logits(model.network(ids[:, :13], causal_window(2, 0, 13), store))
        pos = torch.arange(13, T).expand(2, -1)
        block = Window(torch.arange(2), pos, torch.full_like(pos, T), T)
        answer = model.network.logits(model.network(ids[:, 13:], block, store))
    torch.testing.assert_close(torch.cat([prompt, answer], 1), expected, atol=1e-5, rtol=1e-5)
