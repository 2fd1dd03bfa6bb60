# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (arXiv 2106.09685) as peft saves them, merged into the weights while these are read.

A published tensor `NAME.weight` becomes itself plus scale * B A, for the pair `base_model.model.NAME.lora_A.weight` [r, in]
and `...lora_B.weight` [out, r]; scale is alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732). Only projections have
pairs.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdllm.models.files import Fields, read_object
from fastdllm.models.weights import check_finite, headers, read_tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {".lora_A.weight": 0, ".lora_B.weight": 1}
# What an adapter may ask for beyond a plain LoRA, and the values that ask for nothing.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": (),
    "lora_bias": (False,),
    "megatron_config": (),
    "modules_to_save": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "use_bdlora": (False,),
    "use_qalora": (False,),
    # The others change the weights of the base model as well.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


class Adapter:
    """The pairs of one adapter folder, by the published name of the tensor they change.

    Raises ValueError or FileNotFoundError naming the file and what is wrong with it, DoRA and other kinds by their name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / WEIGHTS
        self.config = Fields(read_object(folder / CONFIG), f"{folder}: {CONFIG}")
        self._check_kind()
        if not self.path.exists():
            raise FileNotFoundError(f"{folder}: no {WEIGHTS} (only this format is read)")
        self.pairs: dict[str, list[str]] = {}
        self.shapes = {name: shape for name, (_, shape) in headers([self.path]).items()}
        for name in self.shapes:
            part = next((p for p in PARTS if name.endswith(p)), None)
            if part is None or not name.startswith(PREFIX):
                raise ValueError(f"{self.path}: the tensor {name!r} is no part of a LoRA on a projection")
            module = name.removeprefix(PREFIX).removesuffix(part)
            self.pairs.setdefault(f"{module}.weight", ["", ""])[PARTS[part]] = name

    def _check_kind(self) -> None:
        kind = self.config.text("peft_type")
        if kind != "LORA":
            raise self.config.wrong("peft_type", "only 'LORA' is supported")
        for name in ("use_dora", "alora_invocation_tokens"):
            if self.config.get(name):
                raise self.config.wrong(name, f"{'DoRA' if name == 'use_dora' else 'aLoRA'} is not supported")
        for name, usual in PLAIN.items():
            value = self.config.get(name)
            if value is not None and not any(type(value) is type(u) and value == u for u in usual):
                raise self.config.wrong(name, f"supported are {', '.join(map(repr, usual)) or 'null'}")

    def check(self, expected: dict[str, list[int]]) -> None:
        """Raises ValueError unless every pair fits one of the model's tensors; `expected`: their shapes by name."""
        if not self.pairs:
            raise ValueError(f"{self.path}: no tensors")
        for name, (a, b) in self.pairs.items():
            if not a or not b:
                raise ValueError(f"{self.path}: of {name!r} only {(a or b)!r} is there")
            if name not in expected or len(expected[name]) != 2:
                base = self.config.get("base_model_name_or_path")
                raise ValueError(f"{self.path}: the model has no projection {name!r}; the adapter was made for {base!r}")
            out, into = expected[name]
            rank = self._number("r", "rank_pattern", name)
            if self.shapes[a] != [rank, into] or self.shapes[b] != [out, rank]:
                raise ValueError(
                    f"{self.path}: {a!r} and {b!r} have shapes {self.shapes[a]} and {self.shapes[b]}, "
                    f"a rank of {rank} on {name!r} asks for {[rank, into]} and {[out, rank]}"
                )

    def scale(self, name: str) -> float:
        """The factor on B A."""
        rank, alpha = self._number("r", "rank_pattern", name), self._number("lora_alpha", "alpha_pattern", name)
        return alpha / (math.sqrt(rank) if self.config.flag("use_rslora") else rank)

    def _number(self, field: str, patterns: str, name: str) -> int | float:
        """The rank or alpha of a module; a pattern that ends its name overrides the adapter's own."""
        listed, module = self.config.inner(patterns), name.removesuffix(".weight")
        for pattern in listed:
            try:
                fits = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise listed.wrong(pattern, f"it is no regular expression ({error})") from error
            if fits:
                return self._positive(listed, pattern, field)
        return self._positive(self.config, field, field)

    @staticmethod
    def _positive(fields: Fields, name: str, field: str) -> int | float:
        return fields.integer(name, 1, 2**16) if field == "r" else fields.number(name, 1e-6, 1e6)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The published tensor `name` with its pair merged, in fp32; without a pair as it is."""
        if name not in self.pairs:
            return tensor
        a, b = (read_tensor(self.path, part) for part in self.pairs[name])
        for part, value in zip(self.pairs[name], (a, b), strict=True):
            check_finite(value, self.path, part)
        high = torch.promote_types(tensor.dtype, torch.float32)
        return tensor.to(high) + (b.to(high) @ a.to(high)) * self.scale(name)
