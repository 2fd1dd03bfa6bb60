# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints load unchanged, in little memory, and a bad one is an error that names the tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdllm
from fastdllm.models import FAMILIES
from fastdllm.models.transformer import Transformer
from tests.published_checkpoints import VOCAB, llada_config, qwen2_config, special_ids, write_checkpoint, write_json

KINDS = ["llada", "dream", "v2"]


@pytest.mark.parametrize("kind, tied, bias", [(k, t, b) for k in KINDS for t in (False, True) for b in (False, True)])
def test_the_name_table_fills_every_parameter_once(kind: str, tied: bool, bias: bool) -> None:
    """Names map one to one onto consecutive rows, and together they cover each parameter exactly."""
    config = (
        llada_config(weight_tying=tied, include_qkv_bias=bias)
        if kind == "llada"
        else qwen2_config(kind, tie_word_embeddings=tied)
    )
    family = import_module(f"fastdllm.models.{FAMILIES[config['model_type']]}").FAMILY
    spec = family.spec(config, special_ids(kind))
    parameters = {n: p.shape for n, p in Transformer(spec).named_parameters()}
    table = family.names(spec)
    assert len(set(table.values())) == len(table)
    assert {target for target, _ in table.values()} == set(parameters)
    assert not set(table) & family.optional(spec)
    q, kv, ffn = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.ffn
    for target, shape in parameters.items():
        starts = sorted(row for t, row in table.values() if t == target)
        cuts = {"qkv": [0, q, q + kv], "gate_up": [0, ffn]}.get(
            target.split(".")[2] if target.startswith("layers") else "", [0]
        )
        assert starts == cuts
        assert shape[0] == {"qkv": q + 2 * kv, "gate_up": 2 * ffn}.get(
            target.split(".")[2] if "layers" in target else "", shape[0]
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"shards": 3}, {"style": 5}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str
)
def test_variants_load_as_the_plain_checkpoint(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    write_checkpoint(tmp_path / "plain", kind)
    torch.manual_seed(1)
    write_checkpoint(tmp_path / "variant", kind, **options)
    dtype = options.get("dtype", torch.float32)
    plain, variant = (fastdllm.load(str(tmp_path / f), device="cpu", dtype=dtype) for f in ("plain", "variant"))
    assert plain.spec == variant.spec and variant.dtype == dtype
    for (name, a), (_, b) in zip(plain.network.named_parameters(), variant.network.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not b.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_half_precision_generates(tmp_path: Path, kind: str, dtype: Any) -> None:
    write_checkpoint(tmp_path, kind)
    model = fastdllm.load(str(tmp_path), device="cpu", dtype=dtype)
    out = fastdllm.generate(model, "Tom has 12 apples", gen_length=8, block_length=8)
    assert model.dtype == (torch.float16 if dtype == "float16" else torch.bfloat16)
    assert not (out.sequences[0] == model.spec.mask_id).any()


def test_the_mask_and_unused_rows_are_banned(tmp_path: Path) -> None:
    for kind in KINDS:
        write_checkpoint(tmp_path / kind, kind)
        model = fastdllm.load(str(tmp_path / kind), device="cpu")
        assert model.spec.vocab == VOCAB > len(model.tokenizer)
        assert model.banned.nonzero()[:, 0].tolist() == [model.spec.mask_id, *range(len(model.tokenizer), VOCAB)]


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_and_stops(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, kind)
    spec, ids = fastdllm.load(str(tmp_path), device="cpu").spec, special_ids(kind)
    stops = {
        "llada": ["<|endoftext|>", "<|eot_id|>"],
        "dream": ["<|endoftext|>", "<|im_end|>"],
        "v2": ["<|im_end|>", "<|endoftext|>"],
    }
    assert spec.stop_ids == tuple(ids[t] for t in stops[kind])
    assert spec.mask_id == ids[{"llada": "<|mdm_mask|>", "dream": "<|mask|>", "v2": "|<MASK>|"}[kind]]
    assert (spec.shift, spec.block_causal) == {"llada": (0, 0), "dream": (1, 0), "v2": (1, 8)}[kind]


def edit(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


LAST = {
    "llada": "model.transformer.blocks.1.up_proj.weight",
    "dream": "model.layers.1.self_attn.k_proj.bias",
    "v2": "lm_head.weight",
}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_checkpoints_name_the_tensor(tmp_path: Path, kind: str) -> None:
    name = LAST[kind]
    for problem, change, message in (
        ("missing", lambda t: t.pop(name), f"lacks 1 tensor.*{name}"),
        ("unexpected", lambda t: t.update(extra=torch.ones(1)), "unexpected tensor 'extra'"),
        ("short", lambda t: t.update({name: t[name][:-1].clone()}), f"'{name}' has shape"),
        ("long", lambda t: t.update({name: torch.cat([t[name], t[name]])}), f"'{name}' has shape"),
        ("flat", lambda t: t.update({name: t[name].flatten()[:7].clone()}), f"'{name}' has shape"),
    ):
        folder = tmp_path / problem
        write_checkpoint(folder, kind)
        edit(folder, change)
        with pytest.raises(ValueError, match=message):
            fastdllm.load(str(folder), device="cpu")


def test_a_fused_part_of_a_wrong_height_is_an_error_wherever_it_stands(tmp_path: Path) -> None:
    """One row more or less would fit into the fused matrix and silently shift or clobber its neighbour."""
    for name in ("q_proj", "k_proj", "v_proj"):
        for rows in (-1, 1):
            folder = tmp_path / f"{name}{rows}"
            write_checkpoint(folder, "dream")
            full = f"model.layers.0.self_attn.{name}.weight"
            edit(folder, lambda t, n=full, r=rows: t.update({n: torch.randn(t[n].shape[0] + r, t[n].shape[1])}))
            with pytest.raises(ValueError, match=f"'{full}' has shape"):
                fastdllm.load(str(folder), device="cpu")


def test_what_old_checkpoints_carry_besides_is_accepted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dream", "dream")
    edit(tmp_path / "dream", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    fastdllm.load(str(tmp_path / "dream"), device="cpu")
    tensors = write_checkpoint(tmp_path / "v2", "v2", tie_word_embeddings=True)
    edit(tmp_path / "v2", lambda t: t.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    network = fastdllm.load(str(tmp_path / "v2"), device="cpu").network
    assert network.head.weight is network.embed.weight


def test_bad_folders_and_configs_say_what_is_wrong(tmp_path: Path) -> None:
    def broken(name: str, error: type[Exception], message: str, **config: Any) -> None:
        folder = tmp_path / name
        with pytest.raises(error, match=message):
            fastdllm.load(str(folder), device="cpu")

    def fresh(name: str, kind: str = "llada", **options: Any) -> Path:
        write_checkpoint(tmp_path / name, kind, **options)
        return tmp_path / name

    weights = fresh("torn") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    broken("torn", ValueError, "model.safetensors: not a readable safetensors file")
    (fresh("shard", shards=3) / "model-00002-of-00003.safetensors").unlink()
    broken("shard", FileNotFoundError, "names model-00002-of-00003.safetensors, not found")
    (fresh("none") / "model.safetensors").unlink()
    broken("none", FileNotFoundError, r"no \.safetensors file")
    (fresh("json") / "config.json").write_text('{"model_type": ')
    broken("json", ValueError, "config.json is not valid JSON")
    write_json(fresh("type") / "config.json", llada_config(model_type="gpt2"))
    broken("type", ValueError, "model_type='gpt2'; known are 'llada', 'Dream', 'Fast_dLLM_Qwen'")
    config = qwen2_config("dream")
    del config["num_hidden_layers"]
    write_json(fresh("field", "dream") / "config.json", config)
    broken("field", ValueError, "config.json lacks the field 'num_hidden_layers'")
    write_json(fresh("heads", "dream") / "config.json", qwen2_config("dream", num_key_value_heads=3))
    broken("heads", ValueError, "num_key_value_heads=3; num_attention_heads=4 is no multiple of it")
    write_json(fresh("mask") / "config.json", llada_config(mask_token_id=9999))
    broken("mask", ValueError, r"mask_token_id=9999; the tokenizer's mask '<\|mdm_mask\|>' is 586")
    write_json(fresh("alibi") / "config.json", llada_config(alibi=True))
    broken("alibi", ValueError, "alibi=True; only False is supported")
    write_json(fresh("rope", "v2") / "config.json", qwen2_config("v2", rope_scaling={"type": "yarn", "factor": 4.0}))
    broken("rope", ValueError, "rope_scaling has type='yarn'; supported are default")
    (tmp_path / "empty").mkdir()
    broken("empty", FileNotFoundError, "the folder has no config.json")
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor a shipped name \(.*tiny-llada.*\) nor a hub id"):
        fastdllm.load("tiny-lada")
    with pytest.raises(ValueError, match="model 5 must be a shipped name, a folder or a hub id"):
        fastdllm.load(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype='float8' is unknown; allowed are auto, float32, bfloat16, float16"):
        fastdllm.load(str(fresh("dtype")), dtype="float8")


def test_a_revision_of_what_is_not_on_the_hub_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "mine", "v2")
    for name in ("tiny-llada", str(tmp_path / "mine")):
        with pytest.warns(UserWarning, match=f"revision='v9' has no effect: '{name}' does not come from the hub"):
            fastdllm.load(name, revision="v9", device="cpu")


def test_the_family_does_not_come_from_the_path(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "Dream-Instruct-llada", "v2")
    assert fastdllm.load(str(tmp_path / "Dream-Instruct-llada"), device="cpu").spec.family == "fast_dllm_v2"


# Not ru_maxrss: a child inherits its parent's, so that under a large test process nothing would ever show.
MEASURE = """
import re, sys, fastdllm
fastdllm.load(sys.argv[1], device="cpu", dtype="float32")
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("shards", [1, 4])
def test_peak_memory_is_the_weights_and_little_more(tmp_path: Path, shards: int) -> None:
    """The weights and one tensor (of an 8B model 7 % at most), on top of what loading a tiny model takes, whether
    the checkpoint is one file or four."""
    shape = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 6, "vocab_size": 16384, "mask_token_id": 3}
    tensors = write_checkpoint(tmp_path / "big", "dream", shards=shards, tokenizer=False, dtype=torch.float32, **shape)
    write_checkpoint(tmp_path / "small", "dream", tokenizer=False)
    size, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    assert size > 180e6
    del tensors

    def peak(folder: str) -> int:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / folder)]
        return 1024 * int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    extra = peak("big") - peak("small")
    assert extra > 0.9 * size, "the weights themselves are not seen"
    assert extra <= 1.05 * size + largest, f"{extra / size:.2f} times the weights"


@pytest.mark.gpu
def test_the_device_holds_the_weights_alone(tmp_path: Path) -> None:
    """No second copy of a tensor on the device, not even of the largest for a moment."""
    tensors = write_checkpoint(tmp_path, "llada", tokenizer=False, dtype=torch.bfloat16, d_model=512, embedding_size=16384)
    size, largest = (f(2 * t.numel() for t in tensors.values()) for f in (sum, max))
    # In a process of its own: what other tests left on the device may be freed at any moment.
    code = (
        "import sys, torch, fastdllm\n"
        "model = fastdllm.load(sys.argv[1], device='cuda', dtype='bfloat16')\n"
        "print(torch.cuda.max_memory_allocated())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert size <= int(done.stdout) < size + largest / 2
    model = fastdllm.load(str(tmp_path), device="cuda", dtype="bfloat16")
    assert torch.equal(model.network.head.weight.cpu(), tensors["model.transformer.ff_out.weight"].bfloat16())


def test_loading_does_not_import_the_compiler() -> None:
    """It costs every start over a second, and comes in with the first random number on the meta device."""
    code = "import sys, fastdllm; fastdllm.load('tiny-llada', 'cpu'); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_json_index_of_a_sharded_checkpoint_is_what_is_read(tmp_path: Path) -> None:
    """A stray file beside the shards is not loaded."""
    write_checkpoint(tmp_path, "llada", shards=2)
    save_file({"stray": torch.ones(1)}, tmp_path / "other.safetensors")
    fastdllm.load(str(tmp_path), device="cpu")
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
