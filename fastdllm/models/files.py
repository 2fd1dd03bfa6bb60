# SPDX-License-Identifier: Apache-2.0
"""The text files of a checkpoint folder, read with a type and a range for every field.

Whatever is wrong with a file (missing, a git-lfs pointer, not UTF-8, not JSON, a field of another type) is a ValueError or
an OSError that names the file, never an exception of some library's inside. A field that nobody read and that would change
the mathematics is an error too, so that no checkpoint is quietly run as something else.
"""

from __future__ import annotations

import json
import math
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastdllm.fields import shown

LFS = b"version https://git-lfs"
LARGEST = 2**30  # bytes of a file that is read whole; published ones have some 20 million
MISSING: Any = object()
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "added_tokens.json",
    "tokenizer.model",
)

# Fields of config.json that change what a network computes, over the architectures that people convert from, with the values
# that mean "as usual". A family that reads such a field decides itself.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_layer_norm": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (False, 0),
    "bias_for_layer_norm": (False,),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "clip_qkv": (),
    "decoder_sparse_step": (1,),
    "embedding_multiplier": (1, 1.0),
    "final_logit_softcapping": (),
    "first_k_dense_replace": (),
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "include_bias": (False,),
    "is_causal": (False,),
    "input_emb_norm": (False,),
    "kv_lora_rank": (),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "mlp_bias": (False,),
    "mlp_only_layers": ([],),
    "moe_layer_freq": (1,),
    "multi_query_attention": (False,),
    "n_routed_experts": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "num_nextn_predict_layers": (0,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1, 1.0),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1, 1.0),
    "rope": (True,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rope_parameters": (),
    "rope_scaling": (),
    "rotary_dim": (),
    "rotary_percent": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "scale_logits": (False,),
    "scale_embeddings": (False,),
    "scoring_func": (),
    "sliding_window_pattern": (),
    "swiglu_limit": (),
    "text_config": (),
    "tie_word_embeddings": (False,),
    "topk_method": (),
    "use_alibi": (False,),
    "use_bias": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_qkv_bias": (False,),
    "use_sliding_window": (False,),
    "vision_config": (),
    "weight_tying": (False,),
}
# Fields that say nothing about what a network computes when it decodes: names, training, files, older libraries.
# fmt: off
HARMLESS = frozenset([
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "alibi_bias_max",
    "architectures", "attention_dropout", "attention_layer_norm_with_affine", "attention_probs_dropout_prob",
    "attention_type", "attn_impl", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty",
    "do_sample", "dtype", "early_stopping", "embedding_dropout", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "flash_attention", "forced_bos_token_id", "forced_eos_token_id",
    "fuse_cross_entropy", "fused_loss", "gradient_checkpointing", "hidden_dropout_prob", "id2label", "init_cutoff_factor",
    "init_device", "init_fn", "init_std", "initializer_range", "is_decoder", "is_encoder_decoder",
    "keys_to_ignore_at_inference", "label2id", "length_penalty", "license", "mask_token_id", "max_length",
    "max_window_layers", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "precision",
    "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "resid_pdrop", "residual_dropout", "return_dict", "return_dict_in_generate", "rope_full_precision", "sep_token_id",
    "sliding_window", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
])
# fmt: on


def present(path: Path) -> bool:
    """Whether a folder has an entry of that name. A link to nothing counts: its file was meant to be there, and reading it
    says so."""
    return os.path.lexists(path)


def check_regular(path: Path) -> None:
    """Raises ValueError for a pipe or a device, which reading might never come to the end of."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path}: not a file but a pipe, a socket or a device")


def read_bytes(path: Path) -> bytes:
    """The content of a file. OSError or ValueError naming it: missing, a folder, a pipe, too large, a git-lfs pointer."""
    try:
        check_regular(path)
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"{path}: has {size} bytes, at most {LARGEST} are read")
        content = path.read_bytes()
    except OSError as error:
        raise type(error)(f"{path}: cannot be read ({error.strerror})") from error
    if content[:64].startswith(LFS):
        raise ValueError(f"{path}: a git-lfs pointer instead of the file; run `git lfs pull` in the folder")
    return content


def read_text(path: Path) -> str:
    """A UTF-8 text (with or without a byte order mark)."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    try:
        value = json.loads(read_text(path), object_pairs_hook=_unambiguous)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {path.name} is not valid JSON ({error})") from error
    except ValueError as error:  # a number of more digits than Python converts, a name with two values
        raise error if str(path) in str(error) else ValueError(f"{path}: {path.name} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {path.name} holds {shown(value)}, not a JSON object")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields. ValueError for a name with two values: readers differ in which of them counts."""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    for name, value in pairs:
        if fields[name] != value:
            raise ValueError(f"the name {name!r} is there twice, with {shown(value)} and {shown(fields[name])}")
    return fields


class Fields(Mapping[str, Any]):
    """The fields of a JSON object, each read by name with its type and range; null is absent.

    `where` is how errors call the object ("FOLDER: config.json"). As a mapping it holds the fields that are not null.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self.where, self._read = where, set[str]()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def wrong(self, name: str, allowed: str) -> ValueError:
        """The error for a field whose value is not `allowed`."""
        return ValueError(f"{self.where} has {name}={shown(self._values.get(name))}; {allowed}")

    def peek(self, name: str) -> Any:
        """A field's value or None, without counting it as read: the family accounts for it."""
        return self._values.get(name)

    def _get(self, name: str, default: Any) -> Any:
        self._read.add(name)
        if name in self._values:
            return self._values[name]
        if default is MISSING:
            raise ValueError(f"{self.where} lacks the field {name!r}")
        return default

    def integer(self, name: str, low: int, high: int, default: Any = MISSING) -> int:
        """A whole number in [low, high]."""
        value = self._get(name, default)
        if name in self._values and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
            raise self.wrong(name, f"it must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: Any = MISSING) -> float:
        """A finite number in [low, high]."""
        value = self._get(name, default)
        if name not in self._values:
            return value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or not math.isfinite(value)
        ):
            raise self.wrong(name, f"it must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "it must be true or false")
        return value

    def text(self, name: str, default: Any = MISSING) -> str:
        """A string."""
        value = self._get(name, default)
        if name in self._values and not isinstance(value, str):
            raise self.wrong(name, "it must be a string")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: one, a list of them, or none where the field is absent."""
        value = self._get(name, [])
        listed = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for i in listed):
            raise self.wrong(name, "it must be a token id or a list of token ids")
        return tuple(dict.fromkeys(listed))

    def inner(self, name: str) -> Fields:
        """A nested object; empty where the field is absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "it must be an object")
        return Fields(value, f"{self.where}: {name}")

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where the field is absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.wrong(name, "it must be a list of strings")
        return tuple(value)

    def replace(self, name: str, value: Any) -> Fields:
        """The same fields, with another value for one."""
        return Fields({**self._values, name: value}, self.where)

    def rest(self) -> set[str]:
        """The names of the fields that were not read."""
        return set(self._values) - self._read

    def check_rest(self, harmless: frozenset[str] = frozenset()) -> None:
        """Account for every field that was not read. ValueError for one that changes the mathematics, or that nobody knows:
        it may. One that says False or null turns nothing on: of the former a warning tells.

        harmless: further names that say nothing about the network.
        """
        unknown, off = [], []
        for name in sorted(self.rest() - HARMLESS - harmless):
            value = self._values[name]
            if name not in NEUTRAL:
                if value is not None:
                    (off if value is False else unknown).append(f"{name}={shown(value)}")
            elif not any(type(value) is type(usual) and value == usual for usual in NEUTRAL[name]):
                usual = " or ".join(map(repr, NEUTRAL[name])) or "null"
                raise self.wrong(name, f"only {usual} is supported")
        if unknown:
            raise ValueError(
                f"{self.where} has fields that are not known: {', '.join(unknown)}; where they do not change what the "
                "network computes, delete them from the file"
            )
        if off:
            warnings.warn(f"{self.where} has fields that are not known and not used: {', '.join(off)}", stacklevel=2)
