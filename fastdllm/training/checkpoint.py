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
from transformers.trainer_callback import TrainerState

from fastdllm import whole
from fastdllm.fields import shown
from fastdllm.models import find_folder, read_spec, tiny_names
from fastdllm.models.fast_dllm_v2 import FAMILY
from fastdllm.models.files import Fields, present, read_object
from fastdllm.models.tokenizer import load_tokenizer, special_ids
from fastdllm.models.weights import shards
from fastdllm.training.model import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM

try:
    from transformers.trainer_pt_utils import safe_globals
except ImportError:  # transformers 4.57.1 has it elsewhere
    from transformers.trainer import safe_globals

MASK_TOKEN = "|<MASK>|"
MODEL_TYPES = ("qwen2", Fast_dLLM_QwenConfig.model_type)
# Rewritten on saving; what an older library or another class wrote there must not be carried along.
WEIGHTS, ADAPTER = "model.safetensors", "adapter_config.json"
# What a training checkpoint may hold its weights in: a model, an adapter, FSDP's and DeepSpeed's own form.
CHECKPOINT_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model_fsdp*", "global_step*")
# What a run writes, of which another run's must not be there: it would be overwritten, or read in place of this one's.
OUTPUTS = ("checkpoint-*", "config.json", "*.safetensors", "*.safetensors.index.json", ADAPTER, "merged")
OWN_FIELDS = {"model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype"}
OWN_FIELDS |= {
    "attn_implementation",
    "_attn_implementation",
    "id2label",
    "label2id",
    "num_labels",
}  # and these say nothing here


def read_config(folder: Path, block: int | None, tensors: int) -> Fast_dLLM_QwenConfig:
    """The folder's configuration with `block` tokens a block; None keeps the checkpoint's, 32 for plain Qwen2.

    tensors: of its weights. A layer has several, so there are not more layers; transformers makes a list of them.
    """
    fields = read_object(folder / "config.json")
    kind = fields.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{folder}: model_type={kind!r} cannot be trained; allowed are {', '.join(MODEL_TYPES)}")
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
    if isinstance(rope := kept.get("rope_parameters"), dict) and rope.get("rope_theta") is not None:
        kept.setdefault("rope_theta", rope["rope_theta"])  # transformers 4 does not look into the others
    if kept.pop("quantization_config", None):
        raise ValueError(f"{folder}: config.json has quantization_config; quantised weights cannot be trained")
    try:
        config = Fast_dLLM_QwenConfig(**{**kept, "bd_size": size})
        config.to_dict()
        with torch.device("meta"):
            Fast_dLLM_QwenForCausalLM(config)
    except Exception as error:  # of whatever transformers does with a value of a wrong type
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: config.json makes no model: {type(error).__name__}: {reason}") from error
    return config


def load_for_training(
    name: str,
    block: int | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> tuple[Fast_dLLM_QwenForCausalLM, PreTrainedTokenizerFast]:
    """Load a Qwen2 or Fast-dLLM v2 checkpoint: a shipped name, a folder or a hub id.

    `|<MASK>|` takes the tokenizer's first free id unless it has one; the embedding grows only when no row is left
    for it, as Qwen2.5's does not. attention: "sdpa" or "flex_attention", which has no backward on a CPU. Raises ValueError
    for a checkpoint that lacks tensors, has others than the model, or holds numbers that are no weights, and for one that
    could not be decoded after the training.
    """
    local = Path(name).expanduser()
    if (local / ADAPTER).is_file() and not list(local.glob("model*.safetensors")):
        base = read_object(local / ADAPTER).get("base_model_name_or_path")
        raise ValueError(f"{name}: a LoRA adapter of {base}; train from a whole model (--merge_lora writes one)")
    folder = find_folder(name)
    if (folder / ADAPTER).is_file():  # transformers would add it, frozen
        raise ValueError(f"{folder}: holds a LoRA adapter next to the model; train from a folder that holds one of them")
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
    check_decodable(folder, config, tokenizer, shapes)
    model = Fast_dLLM_QwenForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=attention)
    if names := [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]:
        raise ValueError(f"{folder}: NaN or infinite weights in {quote(names)}")
    # Adapters name the model that they belong to: by where others find it, not by this machine's cache.
    model.name_or_path = str(local.resolve()) if local.is_dir() and name not in tiny_names() else name
    if config.mask_token_id >= config.vocab_size:
        model.resize_token_embeddings(config.mask_token_id + 1)
    return model, tokenizer


def check_decodable(
    folder: Path, config: Fast_dLLM_QwenConfig, tokenizer: PreTrainedTokenizerFast, tensors: Collection[str]
) -> None:
    """Raise ValueError for a config.json that decoding refuses, or reads as another network than transformers' Qwen2.

    transformers keeps what it does not know and says nothing of it, and the published format has no place for some of what
    it heeds (`rope_scaling`). So a run would train one model and leave another, or one that nobody can load.

    config: what is trained, with the mask. tensors: the names of its weights.
    """
    fields = {name: value for name, value in read_object(folder / "config.json").items() if name not in OWN_FIELDS}
    for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings"):  # transformers fills them in, and saves them
        fields.setdefault(name, getattr(config, name, None) or config.rope_parameters.get(name))
    size = max(config.vocab_size, config.mask_token_id + 1)
    fields |= {"bd_size": config.bd_size, "mask_token_id": config.mask_token_id, "vocab_size": size}
    where = f"{folder}: config.json"
    spec = read_spec(FAMILY, Fields(fields, where), folder, tokenizer, special_ids(tokenizer))
    if other := sorted((FAMILY.names(spec).keys() ^ set(tensors)) - {FAMILY.tied}):
        raise ValueError(f"{where} describes a network that differs from transformers' Qwen2 in the tensors {quote(other)}")


def quote(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def tensor_shapes(folder: Path, weights: str = WEIGHTS) -> dict[str, list[int]]:
    """The shape of each tensor, read off the headers of the weight files.

    Raises ValueError for files that cannot be read, and for tensors in two files or not of floating-point numbers.
    """
    found: dict[str, list[int]] = {}
    for path in shards(folder) if present(folder / f"{weights}.index.json") else [folder / weights]:
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
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        return f"cannot be read ({error})"
    return None


def damage(checkpoint: Path, model: torch.nn.Module | None = None, needed: Collection[str] = ()) -> str | None:
    """What a run of `model` could not resume from in a Trainer's checkpoint folder, None where it is whole and its own.

    A Trainer would fail on some of it, and go on with other weights on the rest: it loads what fits and leaves out what does
    not. needed: further files that must be there.
    """
    for name in ("trainer_state.json", *needed):
        if not (checkpoint / name).is_file():
            return f"there is no {name}"
    if not any(path for pattern in CHECKPOINT_WEIGHTS for path in checkpoint.glob(pattern)):
        return "there are no weights"
    problems = ((path, torn(path)) for path in sorted(checkpoint.rglob("*")) if path.is_file())
    if found := next((f"{path.name} {problem}" for path, problem in problems if problem), None):
        return found
    return _wrong_state(checkpoint) or (_of_another_model(checkpoint, model) if model is not None else None)


def _wrong_state(checkpoint: Path) -> str | None:
    """What is wrong with the state of a Trainer, its optimizer and its scheduler."""
    try:
        for name in ("config.json", ADAPTER, "generation_config.json"):
            if (checkpoint / name).is_file():
                read_object(checkpoint / name)
    except ValueError as error:
        return str(error).removeprefix(f"{checkpoint / name}: ")
    try:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except TypeError:  # no object, or one with other fields
        return "trainer_state.json is no state of a Trainer"
    name, _, step = checkpoint.name.rpartition("-")
    at = state.global_step
    if not isinstance(at, int) or at < 0 or (name == "checkpoint" and step.isdecimal() and at != int(step)):
        return f"trainer_state.json has global_step={shown(at)}"
    if not isinstance(state.train_batch_size, int | None):
        return f"trainer_state.json has train_batch_size={shown(state.train_batch_size)}"
    for name, keys in {"optimizer.pt": ("state", "param_groups"), "scheduler.pt": ("last_epoch",)}.items():
        if (checkpoint / name).is_file():
            value = _loaded(checkpoint / name)
            if not isinstance(value, dict) or not value.keys() >= {*keys}:
                return f"{name} holds no state of its kind"
    for path in checkpoint.glob("rng_state*.pth"):
        if not isinstance(_loaded(path), dict):
            return f"{path.name} holds no state of its kind"
    return None


def _loaded(path: Path) -> Any:
    """What torch.save wrote, as a Trainer reads it, the tensors left on the disk; None for what cannot be read."""
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # of torch's reader, or of whatever the file holds
        return None


def _of_another_model(checkpoint: Path, model: torch.nn.Module) -> str | None:
    """Where weights or optimizer are not those of `model`, or no numbers to go on with."""
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        return None  # ZeRO-3 spreads the model: its parameters have no shape by themselves
    adapter = hasattr(model, "peft_config")
    weights = "adapter_model.safetensors" if adapter else WEIGHTS
    if not list(checkpoint.glob(weights.replace(".", "*."))):
        return (
            None if list(checkpoint.glob("*_fsdp*")) or list(checkpoint.glob("global_step*")) else f"there is no {weights}"
        )
    tensors = _adapter_tensors(model) if adapter else model.state_dict()
    seen: set[int] = set()
    tied = [name for name, t in tensors.items() if t.data_ptr() in seen or seen.add(t.data_ptr())]
    try:
        check_shapes(checkpoint, tensor_shapes(checkpoint, weights), {n: t.shape for n, t in tensors.items()}, tied)
    except ValueError as error:
        return str(error).removeprefix(f"{checkpoint}: ")
    for path in sorted(checkpoint.glob(weights.replace(".", "*."))):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]  # noqa: SIM118
        if names:
            return f"{path.name} has NaN or infinite weights in {quote(names)}"
    return _other_optimizer(checkpoint / "optimizer.pt", model)


def _adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def _other_optimizer(path: Path, model: torch.nn.Module) -> str | None:
    """Where an optimizer's state is not of the parameters that `model` trains."""
    if not path.is_file():
        return None  # weights may be saved without it
    state = _loaded(path)
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad)
    known = [tuple(one["exp_avg"].shape) for one in state["state"].values() if isinstance(one, dict) and "exp_avg" in one]
    if sum(len(group["params"]) for group in state["param_groups"]) != len(shapes) or (known and sorted(known) != shapes):
        return f"{path.name} is of another model"
    return None


def check_output(folder: Path, resume: str | None) -> None:
    """Raise ValueError where a run would write into a folder that holds a model, an adapter or checkpoints of another one:
    what is there would be lost, or taken for the new run's. A run that goes on with a checkpoint of the folder may.

    resume: what `checkpoint_to_resume` is asked for, None for a run that begins.
    """
    if resume == "latest" or (resume and Path(resume).resolve().parent == folder.resolve()):
        return
    if found := next((path for kind in OUTPUTS for path in sorted(folder.glob(kind))), None):
        raise ValueError(
            f"output_dir={str(folder)!r} holds {found.name} already; give another, or go on with resume_from_checkpoint"
        )


def checkpoint_to_resume(
    wanted: str, output: Path, model: torch.nn.Module | None = None, needed: Collection[str] = ()
) -> tuple[Path, list[str]]:
    """The folder to resume from, and a line for each that was passed over.

    wanted: a folder, or "latest" for the newest whole checkpoint of `output`. model, needed: see `damage`. Raises ValueError
    where there is none.
    """
    if wanted != "latest":
        if problem := damage(Path(wanted), model, needed):
            raise ValueError(f"resume_from_checkpoint={wanted!r}: {problem}")
        return Path(wanted), []
    steps = {path: path.name.rpartition("-")[2] for path in output.glob("checkpoint-*") if path.is_dir()}
    passed = []
    for path in sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda p: -int(steps[p])):
        if not (problem := damage(path, model, needed)):
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
    whole.write_text(path, json.dumps(fields, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
