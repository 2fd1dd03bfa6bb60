# SPDX-License-Identifier: Apache-2.0
"""From a name, a folder or a hub id to a model on a device."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdllm.drafts import Calibration
from fastdllm.fields import shown
from fastdllm.libraries import has_tokenizers
from fastdllm.libraries import hint as libraries_hint
from fastdllm.models.adapters import Adapter
from fastdllm.models.files import TOKENIZER_FILES, Fields, present, read_object
from fastdllm.models.hub import TINY, find_adapter, find_folder, tiny_names
from fastdllm.models.int4 import layout_of
from fastdllm.models.quantize import KINDS
from fastdllm.models.quantize import quantize as quantize_network
from fastdllm.models.spec import END_ROLE, MASK_ROLE, Family, ModelSpec, with_generation
from fastdllm.models.transformer import Transformer
from fastdllm.models.weights import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["FAMILIES", "TINY", "Family", "Model", "ModelSpec", "find_folder", "load", "read_family", "tiny_names"]

# By model_type, or by architecture where the model_type is that of a network which does not diffuse.
FAMILIES = {
    "llada": "llada",
    "Dream": "dream",
    "Fast_dLLM_Qwen": "fast_dllm_v2",
    "sdar": "sdar",
    "a2d-qwen3": "a2d",
    "a2d-qwen2": "a2d",
    "a2d-llama": "a2d",
    "LLaDAMoEModelLM": "llada_moe",
    "LLaDAMoEModel": "llada_moe",
    "llada2_moe": "llada2_moe",
    "StableDiffcoderForCausalLM": "stable_diffcoder",
    "nemotron_labs_diffusion": "nemotron",
}
# The classes that the published files of the others name.
CLASSES = {
    "LLaDAModelLM": "llada",
    "DreamModel": "dream",
    "Fast_dLLM_QwenForCausalLM": "fast_dllm_v2",
    "SDARForCausalLM": "sdar",
    "A2DQwen3LMHeadModel": "a2d",
    "A2DQwen2LMHeadModel": "a2d",
    "A2DLlamaLMHeadModel": "a2d",
    "LLaDA2MoeModelLM": "llada2_moe",
    "NemotronLabsDiffusionModel": "nemotron",
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "float": torch.float32,
    "half": torch.float16,
    "double": torch.float64,
}
ALLOWED = "device, dtype, revision, quantize, block_size, adapter"
# What other libraries call the arguments of `load`.
OTHER_NAMES = {
    "torch_dtype": "dtype=",
    "device_map": "device=",
    "load_in_8bit": "quantize='int8'",
    "quantization_config": "quantize=",
    "lora_path": "adapter=",
    "peft": "adapter=",
    "attn_implementation": "none: the attention is the project's own",
}


# What people of transformers look for on a model.
ELSEWHERE = {
    "generate": "it is a function: fastdllm.generate(model, prompts, gen_length=...)",
    "chat": "fastdllm.generate(model, messages) answers a conversation, and `fastdllm chat` is one",
    "stream": "it is a function: fastdllm.stream(model, prompts), or fastdllm.stream_text(model, prompt)",
    "diffusion_generate": "fastdllm.generate(model, prompts, gen_length=...) is the function",
    "to": "the device is chosen when loading: fastdllm.load(name, device=...)",
    "cuda": "the device is chosen when loading: fastdllm.load(name, device='cuda')",
    "cpu": "the device is chosen when loading: fastdllm.load(name, device='cpu')",
    "half": "the number format is chosen when loading: fastdllm.load(name, dtype='float16')",
    "bfloat16": "the number format is chosen when loading: fastdllm.load(name, dtype='bfloat16')",
    "eval": "there is nothing to switch: a model only infers",
    "train": "fine-tuning is v2/finetune.py",
    "config": "its shapes and ids are model.spec; how it decodes is a fastdllm.DecodeConfig",
    "generation_config": "how it decodes is a fastdllm.DecodeConfig",
    "forward": "the network is model.network; fastdllm.log_likelihoods scores texts",
    "parameters": "the network is model.network, a torch module",
    "state_dict": "the network is model.network, a torch module",
}


@dataclass(eq=False)
class Model:
    """A network, its spec and its tokenizer (None when the folder has none).

    banned: [V] bool, ids that are never predicted: the mask, and vocabulary rows that are no token of the tokenizer.
    calibration: what the option `lossless` drafts, as it was measured on this model.
    """

    network: Transformer
    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast | None = None
    name: str = ""
    calibration: Calibration = field(default_factory=Calibration, repr=False)
    banned: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.banned = torch.zeros(self.spec.vocab, dtype=torch.bool, device=self.device)
        if self.tokenizer is not None:
            self.banned[:] = True
            self.banned[torch.tensor(list(self.tokenizer.get_vocab().values()), device=self.device)] = False
        self.banned[self.spec.mask_id] = True

    def __getattr__(self, name: str) -> Any:
        """Only called for what is not there: says what this is called here."""
        hint = f"; {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        raise AttributeError(f"Model has no attribute {name!r}{hint}")

    @property
    def device(self) -> torch.device:
        return self.network.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.norm.dtype

    def fingerprint(self) -> str:
        """A hash of the spec, of every number of every weight, and of the ids that are never predicted; the same on each
        device. Computed anew at each call, since weights may change: a second or so for 8B parameters.

        It tells apart two checkpoints of one name; it is no protection against somebody who wants two to look alike.
        """
        digest = hashlib.sha256(repr((self.spec, self.dtype)).encode())
        for name, tensor in {**self.network.state_dict(), "banned": self.banned}.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {checksum(tensor):x}\n".encode())
        return digest.hexdigest()


def checksum(tensor: Tensor, chunk: int = 2**20) -> int:
    """The bytes of a tensor as 64-bit words, each times its own odd factor, added up modulo 2^64.

    One pass at the speed of memory, on the tensor's device; which word holds which value matters.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    words = [data[:whole].view(torch.int64)]
    if whole < data.numel():
        words.append(torch.nn.functional.pad(data[whole:], (0, 8 - (data.numel() - whole))).view(torch.int64))
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (chunk,), generator=generator).mul_(2).add_(1).to(tensor.device)
    total = 0
    for part in words:
        for at in range(0, len(part), chunk):
            piece = part[at : at + chunk]
            value = int((piece * factors[: len(piece)]).sum().item())  # sync: once a piece, when a fingerprint is asked for
            total = (total * 0x9E3779B97F4A7C15 + value) % 2**64
    return total


def read_family(config: Mapping[str, Any], folder: Path) -> Family:
    """The family that config.json's model_type names; never guessed from a path.

    Raises ValueError for an unknown model_type, for quantised weights, and for an architecture that shares a known
    model_type and is another network.
    """
    fields = config if isinstance(config, Fields) else Fields(config, f"{folder}: config.json")
    for name in ("quantization_config", "quantization", "compression_config"):
        if name in fields:
            inner = fields.inner(name)
            if name == "quantization_config" and inner.get("quant_method") in ("gptq", "awq"):
                try:
                    layout_of(inner)
                except ValueError as error:
                    raise ValueError(f"{fields.where}: {error}") from error
                continue
            kind = inner.get("quant_method") or inner.get("quant_algo") or f"bits={inner.get('bits')!r}"
            raise ValueError(
                f"{folder}: config.json has {name} ({kind}); of quantised weights GPTQ's and AWQ's in 4 bits are read"
            )
    sizes = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
    experts = [name for name in sizes if fields.peek(name)]
    classes = [c for c in fields.names("architectures") if "moe" in c.lower()]
    kind = fields.get("model_type")
    kinds = [k for k in (*fields.names("architectures"), kind) if isinstance(k, str) and k in FAMILIES]
    of = FAMILIES[kinds[0]] if kinds else ""
    family = import_module(f"fastdllm.models.{of}").FAMILY if kinds else None
    for name in fields.names("architectures"):
        if family and (other := {**CLASSES, **FAMILIES}.get(name, of)) != of:
            raise ValueError(f"{folder}: config.json has model_type={kind!r}, but {name} is the architecture of {other!r}")
    if (experts or classes) and not (family and family.experts):
        found = ", ".join([*classes, *(f"{n}={fields[n]!r}" for n in experts)])
        raise ValueError(f"{folder}: config.json describes a mixture of experts ({found}), which is not supported")
    if family is None:
        raise ValueError(f"{folder}: config.json has model_type={kind!r}; known are {', '.join(map(repr, FAMILIES))}")
    return family


def read_dtype(dtype: str | torch.dtype | None, config: Fields, device: torch.device) -> torch.dtype:
    """The number format of a name, of "auto" (the checkpoint's own), or of None (bfloat16 on CUDA, float32 elsewhere)."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    asked = dtype
    if dtype == "auto":
        dtype = config.text("dtype", config.text("torch_dtype", "float32"))
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={shown(asked)} is unknown; allowed are auto, {', '.join(DTYPES)}")
    return dtype


def read_device(device: str | torch.device | None) -> torch.device:
    """The device of a name; for None and "auto" CUDA if there is one, else the CPU. ValueError for one that is not here."""
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(1, device=found).sum().item()  # sync: once, to try the device
    # What torch raises: for no such device, without CUDA, for one without data ("meta"), and for no name of a device.
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"device={shown(device)} cannot be used here ({reason}); allowed are auto, {here}") from error
    return found


def check_ids(config: Fields, spec: ModelSpec, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError where config.json names an id that is not the control token it should be in the tokenizer."""
    text_of = {i: text for text, i in tokenizer.get_vocab().items()}
    added = set(tokenizer.get_added_vocab().values())
    if (highest := max(text_of, default=0)) >= spec.vocab:
        raise ValueError(
            f"{config.where}: the tokenizer has {text_of[highest]!r} at {highest}, the embedding only {spec.vocab} rows"
        )
    for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        for i in config.ids(name):
            if i not in text_of:
                raise config.wrong(name, f"the tokenizer has no token {i}")
            if i not in added and name in ("mask_token_id", "eos_token_id"):
                raise config.wrong(name, f"in the tokenizer {i} is the text {text_of[i]!r}, no control token")
    if (mask := tokenizer.mask_token_id) is not None and mask != spec.mask_id:
        raise ValueError(f"{config.where}: the mask is {spec.mask_id}, the tokenizer's {tokenizer.mask_token!r} is {mask}")
    if spec.mask_id not in added:
        found = repr(text_of[spec.mask_id]) if spec.mask_id in text_of else "no token"
        raise ValueError(f"{config.where}: the mask is {spec.mask_id}, which is {found} in the tokenizer, no control token")


def read_spec(
    family: Family, config: Fields, about: Path, tokenizer: PreTrainedTokenizerFast | None, ids: Mapping[str, int]
) -> ModelSpec:
    """The spec of the folder `about`, from its config.json and generation_config.json. ids: the tokenizer's added tokens.

    Raises ValueError naming the file and the field that is wrong, or that the tokenizer contradicts.
    """
    if present(path := about / "generation_config.json"):
        config = with_generation(config, Fields(read_object(path), f"{about}: {path.name}"), ids)
    try:
        spec = family.spec(config, ids)
    except ValueError as error:
        raise error if str(about) in str(error) else ValueError(f"{about}: {error}") from error
    if tokenizer is not None:
        check_ids(config, spec, tokenizer)
    return spec


def load(
    name: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    block_size: int | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    **other: Any,
) -> Model:
    """Load a published checkpoint; docs/models.md lists the families.

    name: a shipped name ("tiny-llada"), a local folder or a hub id.
    device: "cpu", "cuda", ...; by default ("auto") CUDA if there is one, else the CPU.
    dtype: "float32", "bfloat16", "float16", "float64", a short form of these, the torch dtype, or "auto" for the
        checkpoint's own; by default bfloat16 on CUDA and float32 elsewhere.
    revision: of a hub id, a branch, tag or commit.
    quantize: "fp8" (Hopper and later), "int8" or "int4" weights; None for the checkpoint's own, which may be GPTQ's or AWQ's
        in 4 bits.
    block_size: of a block-diffusion model whose config.json does not say it (A2D's bd3lm, SDAR), or another than it says.
    adapter: a folder or hub id of a LoRA adapter as peft saves it, merged into the weights. A config.json and a tokenizer in
        it, as our training writes them, say what the adapter makes of the model, and override the model's own.
    trust_remote_code: accepted because other libraries have it; the hub's code is never run.

    Raises FileNotFoundError for a model or a file that is not there (an unknown hub id and an unreachable hub included) and
    ValueError for a file or an argument that is wrong, each naming what it is.
    """
    for key in other:
        hint = f"use {OTHER_NAMES[key]}" if key in OTHER_NAMES else f"allowed are {ALLOWED}"
        raise ValueError(f"load has no option {key!r}; {hint}")
    if trust_remote_code is not False and trust_remote_code is not None:
        warnings.warn("trust_remote_code has no effect: fastdllm runs its own modelling code", stacklevel=2)
    if quantize is not None and not (isinstance(quantize, str) and quantize in KINDS):
        raise ValueError(f"quantize={shown(quantize)} is unknown; allowed are {', '.join(KINDS)}")
    device = read_device(device)
    folder = find_folder(name, revision)
    lora = None if adapter is None else Adapter(find_adapter(adapter))
    about = describing(folder, lora)
    config = Fields(read_object(about / "config.json"), f"{about}: config.json")
    dtype = read_dtype(dtype, config, device)
    family = read_family(config, about)
    if block_size is not None:
        if not family.block_field:
            raise ValueError(f"block_size={shown(block_size)}: the blocks of {folder} are not a choice")
        config = config.replace(family.block_field, block_size)
    tokenizer, ids = read_tokenizer(about if has_tokenizer(about) else folder, name)
    spec = read_spec(family, config, about, tokenizer, ids)
    layout = layout_of(config.inner("quantization_config")) if "quantization_config" in config else None
    if layout and quantize:
        raise ValueError(f"quantize={quantize!r}: the weights of {folder} are quantised already ({layout})")
    try:
        network = load_weights(folder, family, spec, dtype, device, lora, layout)
    except ValueError as error:
        raise error if about == folder else ValueError(f"{error} (the config.json is the adapter's, in {about})") from error
    if quantize is not None:
        quantize_network(network, quantize)
    return Model(network, spec, tokenizer, str(name), Calibration.read(folder))


def describing(folder: Path, adapter: Adapter | None) -> Path:
    """The folder whose config.json holds: an adapter's where it has one (of a plain Qwen2 trained for diffusion)."""
    return adapter.folder if adapter is not None and present(adapter.folder / "config.json") else folder


def read_tokenizer(folder: Path, name: str) -> tuple[PreTrainedTokenizerFast | None, dict[str, int]]:
    """The folder's tokenizer, None where there is none or nothing to read it with, and the ids of its control tokens."""
    if not has_tokenizer(folder):
        return None, {}
    if not has_tokenizers():
        reads = libraries_hint("reading texts", "transformers")
        warnings.warn(f"{name} is loaded without its tokenizer and takes token ids only; {reads}", stacklevel=3)
        return None, written_ids(folder)
    from fastdllm.models.tokenizer import load_tokenizer, special_ids

    tokenizer = load_tokenizer(folder)
    return tokenizer, special_ids(tokenizer)


def written_ids(folder: Path) -> dict[str, int]:
    """What `special_ids` gives, read off the files without the tokenizer's library."""
    files = {name: folder / name for name in ("tokenizer.json", "tokenizer_config.json")}
    read = {name: read_object(path) if present(path) else {} for name, path in files.items()}
    ids = {token["content"]: int(token["id"]) for token in read["tokenizer.json"].get("added_tokens") or ()}
    listed = read["tokenizer_config.json"].get("added_tokens_decoder") or {}
    ids |= {token["content"]: int(i) for i, token in listed.items()}
    named = {role: read["tokenizer_config.json"].get(role) for role in (MASK_ROLE, END_ROLE)}
    texts = {role: text.get("content") if isinstance(text, dict) else text for role, text in named.items()}
    return {**ids, **{role: ids[text] for role, text in texts.items() if text in ids}}


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds any file of a tokenizer; without one the model takes token ids only."""
    return any(present(folder / name) for name in TOKENIZER_FILES)
