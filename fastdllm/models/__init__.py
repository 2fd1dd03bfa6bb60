# SPDX-License-Identifier: Apache-2.0
"""From a name, a folder or a hub id to a model on a device."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdllm.models.quantize import quantize as quantize_network
from fastdllm.models.spec import Family, ModelSpec
from fastdllm.models.transformer import Transformer
from fastdllm.models.weights import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TINY = Path(__file__).parent.parent / "tiny"
FAMILIES = {"llada": "llada", "Dream": "dream", "Fast_dLLM_Qwen": "fast_dllm_v2"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PUBLISHED_FILES = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]


@dataclass(eq=False)
class Model:
    """A network, its spec and its tokenizer (None when the folder has none).

    `banned` [V] bool: ids that are never predicted, the mask and the vocabulary rows beyond the tokenizer.
    """

    network: Transformer
    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast | None = None
    name: str = ""
    banned: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.banned = torch.zeros(self.spec.vocab, dtype=torch.bool, device=self.device)
        self.banned[self.spec.mask_id] = True
        if self.tokenizer is not None:
            self.banned[len(self.tokenizer) :] = True

    @property
    def device(self) -> torch.device:
        return self.network.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.norm.dtype


def tiny_names() -> list[str]:
    """The checkpoints that ship with the package."""
    return sorted(p.parent.name for p in TINY.glob("*/config.json"))


def find_folder(name: str, revision: str | None = None) -> Path:
    """A shipped name, a local folder or a hub id -> the folder that holds the checkpoint."""
    if name in tiny_names():
        return TINY / name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"model {name!r}: the folder has no config.json")
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"model {name!r} is neither a folder nor a shipped name ({', '.join(tiny_names())}) nor a hub id 'owner/name'"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(f"model {name!r} looks like a hub id; `pip install huggingface_hub` to download it") from error
    return Path(snapshot_download(name, revision=revision, allow_patterns=PUBLISHED_FILES))


def read_family(config: dict[str, Any], folder: Path) -> Family:
    """The family that config.json's model_type names; never guessed from a path."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{folder}: config.json has model_type={kind!r}; known are {', '.join(map(repr, FAMILIES))}")
    return import_module(f"fastdllm.models.{FAMILIES[kind]}").FAMILY


def load(
    name: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> Model:
    """Load a published LLaDA, Dream or Fast-dLLM v2 checkpoint.

    name: a shipped name ("tiny-llada"), a local folder or a hub id. device: default is CUDA if there is one, else the CPU.
    dtype: "float32", "bfloat16", "float16" or the torch dtype; default bfloat16 on CUDA, float32 elsewhere.
    quantize: "fp8" (Hopper and later) or "int8" weights, None for none. trust_remote_code: accepted for the call's familiar
    shape; the hub's code is never run.
    Raises FileNotFoundError or ValueError naming what is missing or wrong.
    """
    if trust_remote_code:
        import warnings

        warnings.warn("trust_remote_code has no effect: fastdllm runs its own modelling code", stacklevel=2)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(dtype, str):
        if dtype.removeprefix("torch.") not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; allowed are {', '.join(DTYPES)}")
        dtype = DTYPES[dtype.removeprefix("torch.")]
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = find_folder(name, revision)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}: config.json is not valid JSON ({error})") from error
    family = read_family(config, folder)
    has_tokenizer = any((folder / f).exists() for f in ("tokenizer.json", "vocab.json"))
    tokenizer, ids = None, {}
    if has_tokenizer:
        from fastdllm.models.tokenizer import load_tokenizer, special_ids

        tokenizer = load_tokenizer(folder)
        ids = special_ids(tokenizer)
    try:
        spec = family.spec(config, ids)
    except KeyError as error:
        raise ValueError(f"{folder}: config.json lacks the field {error}") from error
    network = load_weights(folder, family, spec, dtype, device)
    if quantize is not None:
        quantize_network(network, quantize)
    return Model(network, spec, tokenizer, name)
