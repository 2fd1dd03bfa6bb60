# SPDX-License-Identifier: Apache-2.0
"""Where training starts and what it leaves: Qwen2 or Fast-dLLM v2 folders in, Fast-dLLM v2 folders out."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from fastdllm.models import find_folder, tiny_names
from fastdllm.models.tokenizer import load_tokenizer
from fastdllm.training.model import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM

MASK_TOKEN = "|<MASK>|"
MODEL_TYPES = ("qwen2", Fast_dLLM_QwenConfig.model_type)
# Rewritten on saving; what an older library or another class wrote there must not be carried along.
WEIGHTS, ADAPTER = "model.safetensors", "adapter_config.json"
# What a training checkpoint may hold its weights in: a model, an adapter, FSDP's and DeepSpeed's own form.
CHECKPOINT_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model_fsdp*", "global_step*")
OWN_FIELDS = {"model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype"}


def read_config(folder: Path, block: int | None, tensors: int) -> Fast_dLLM_QwenConfig:
    """The folder's configuration with `block` tokens a block; None keeps the checkpoint's, 32 for plain Qwen2.

    tensors: of its weights. A layer has several, so there are not more layers; transformers makes a list of them.
    """
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = fields.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{folder}: model_type={kind!r} cannot be trained; allowed are {', '.join(MODEL_TYPES)}")
    if fields.get("use_sliding_window"):
        raise ValueError(f"{folder}: use_sliding_window=true is not supported; block diffusion attends to all")
    if block is not None and block < 1:
        raise ValueError(f"bd_size={block} must be at least 1")
    layers = fields.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > tensors:
        raise ValueError(f"{folder}: config.json has num_hidden_layers={layers!r}; the checkpoint lacks tensors of them")
    kinds = fields.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise ValueError(f"{folder}: config.json has num_hidden_layers={layers}, which its list layer_types contradicts")
    size = block or fields.get("bd_size", 32)
    kept = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
    if kept.get("rope_scaling") is None:
        kept.pop("rope_scaling", None)  # published as null; transformers 5 warns at the mere name
    return Fast_dLLM_QwenConfig(**{**kept, "bd_size": size})


def load_for_training(
    name: str,
    block: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> tuple[Fast_dLLM_QwenForCausalLM, PreTrainedTokenizerFast]:
    """Load a Qwen2 or Fast-dLLM v2 checkpoint: a shipped name, a folder or a hub id.

    `|<MASK>|` takes the tokenizer's first free id unless it has one; the embedding grows only when no row is left
    for it, as Qwen2.5's does not. attention: "sdpa" or "flex_attention", which has no backward on a CPU. Raises ValueError
    for a checkpoint that lacks tensors, has others than the model, or holds numbers that are no weights.
    """
    local = Path(name).expanduser()
    if (local / ADAPTER).is_file() and not list(local.glob("model*.safetensors")):
        base = json.loads((local / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ValueError(f"{name}: a LoRA adapter of {base}; train from a whole model (--merge_lora writes one)")
    folder = find_folder(name)
    found = tensor_shapes(folder)
    config = read_config(folder, block, len(found))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Fast_dLLM_QwenForCausalLM(config).state_dict().items()}
    check_shapes(folder, found, shapes, {"lm_head.weight"} if config.tie_word_embeddings else ())
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise FileNotFoundError(f"{folder}: no tokenizer.json, nor vocab.json with merges.txt")
    if MASK_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(MASK_TOKEN, special=True, normalized=False)], special_tokens=True)
    config.mask_token_id = tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    model = Fast_dLLM_QwenForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=attention)
    if names := [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]:
        raise ValueError(f"{folder}: NaN or infinite weights in {quote(names)}")
    # Adapters name the model that they belong to: by where others find it, not by this machine's cache.
    model.name_or_path = str(local.resolve()) if local.is_dir() and name not in tiny_names() else name
    if config.mask_token_id >= config.vocab_size:
        model.resize_token_embeddings(config.mask_token_id + 1)
    return model, tokenizer


def quote(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of each tensor, read off the headers of the weight files.

    Raises ValueError for files that cannot be read, and for tensors in two files or not of floating-point numbers.
    """
    found: dict[str, list[int]] = {}
    index = folder / f"{WEIGHTS}.index.json"
    files = {WEIGHTS} if not index.is_file() else set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for path in (folder / name for name in sorted(files)):
        if not path.is_file():
            raise ValueError(f"{folder}: there is no {path.name}")
        if problem := torn(path):
            raise ValueError(f"{path}: {problem}")
        with safe_open(path, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping
            kinds = {name: part.get_dtype() for name, part in parts.items()}
            doubled = sorted(found.keys() & parts.keys())
            found |= {name: part.get_shape() for name, part in parts.items()}
        if doubled:
            raise ValueError(f"{path}: tensors that another file has as well: {quote(doubled)}")
        if names := sorted(name for name, kind in kinds.items() if kind not in ("F64", "F32", "F16", "BF16")):
            raise ValueError(f"{path}: weights that are no floating-point numbers: {quote(names)}")
    return found


def check_shapes(
    folder: Path, found: Mapping[str, list[int]], shapes: Mapping[str, Sequence[int]], optional: Collection[str] = ()
) -> None:
    """Raise ValueError where the tensors of a folder are others than `shapes`; `optional` ones may be there or not."""
    both = found.keys() & shapes.keys()
    problems = {
        "lacks": shapes.keys() - found.keys() - {*optional},
        "has unknown": found.keys() - shapes.keys() - {*optional},
        "has misshapen": {name for name in both if found[name] != list(shapes[name])},
    }
    for what, wrong in problems.items():
        if wrong:
            raise ValueError(f"{folder}: the checkpoint {what} tensors: {quote(sorted(wrong))}")


def torn(path: Path) -> str | None:
    """What is wrong with a file of weights or of training state, None where it is whole.

    A file that was being written when the process ended has its head or its last part missing, which its format shows.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".bin", ".pt", ".pth") and not zipfile.is_zipfile(path):
            return "not a whole file of torch.save"
    except (SafetensorError, ValueError, OSError) as error:
        return f"cannot be read ({error})"
    return None


def damage(checkpoint: Path) -> str | None:
    """What a run could not resume from in a Trainer's checkpoint folder, None where it is whole."""
    if not (checkpoint / "trainer_state.json").is_file():
        return "there is no trainer_state.json"
    if not any(path for pattern in CHECKPOINT_WEIGHTS for path in checkpoint.glob(pattern)):
        return "there are no weights"
    problems = ((path, torn(path)) for path in sorted(checkpoint.rglob("*")) if path.is_file())
    return next((f"{path.name} {problem}" for path, problem in problems if problem), None)


def checkpoint_to_resume(wanted: str, output: Path) -> tuple[Path, list[str]]:
    """The folder to resume from, and a line for each that was passed over.

    wanted: a folder, or "latest" for the newest whole checkpoint of `output`. Raises ValueError where there is none.
    """
    if wanted != "latest":
        if problem := damage(Path(wanted)):
            raise ValueError(f"resume_from_checkpoint={wanted!r}: {problem}")
        return Path(wanted), []
    steps = {path: path.name.rpartition("-")[2] for path in output.glob("checkpoint-*") if path.is_dir()}
    passed = []
    for path in sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda p: -int(steps[p])):
        if not (problem := damage(path)):
            return path, passed
        passed.append(f"{path}: passed over, {problem}")
    raise ValueError("\n".join([*passed, f"resume_from_checkpoint='latest': {output} has no whole checkpoint"]))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer files that transformers 4 and 5 both read.

    Version 5 names a class and a list of special tokens that version 4 does not know.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields.pop("backend", None)
    if isinstance(extra := fields.pop("extra_special_tokens", None), list):
        fields["additional_special_tokens"] = extra
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
