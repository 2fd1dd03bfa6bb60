# SPDX-License-Identifier: Apache-2.0
"""Any family's network, differentiable, over the published tensors under their published names.

`fastdllm.models.Transformer` decodes: fused weights, a store, no gradients. This one trains: plain modules that peft,
FSDP and `state_dict` know what to do with, so that what is saved is a published checkpoint again. Which module fills which
place is read off the family's own table of names; a test holds both networks to the same logits.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedTokenizerFast

from fastdllm import whole
from fastdllm.models import find_folder, read_family
from fastdllm.models.files import read_object
from fastdllm.models.spec import Family, ModelSpec
from fastdllm.models.tokenizer import load_tokenizer, special_ids
from fastdllm.models.weights import expected_shapes, parameter_shapes, shards
from fastdllm.training.checkpoint import check_shapes, quote, tensor_shapes

# Not cuDNN's: since torch 2.11 its backward gives NaN on Hopper with a mask and a width of 64 more than a multiple of 128
# (pytorch/pytorch issue 196678).
BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight.to(x.dtype)


class Network(nn.Module):
    """The transformer that `spec` describes, over `tensors` by published name (`family.names(spec)` says what each is).

    Bidirectional or block-causal is the mask's business: `forward` attends as `visible` says.
    """

    def __init__(self, family: Family, spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec, self.checkpointing = spec, False
        self.places: dict[str, list[str]] = {}  # place in the core's network -> paths of the modules that fill it, in order
        table = family.names(spec)
        for name in sorted(table, key=lambda name: table[name][1]):
            place, kind = table[name][0].removesuffix(".weight"), name.rpartition(".")[2]
            if kind == "bias":
                continue
            path = name.removesuffix(".weight")
            self.places.setdefault(place, []).append(path)
            self._add(path, self._module(place, tensors[name], tensors.get(f"{path}.bias")))

    def _module(self, place: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if place.endswith("norm"):
            return RMSNorm(weight, self.spec.rms_eps)
        if place == "embed":
            return nn.Embedding.from_pretrained(weight, freeze=False)
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight = nn.Parameter(weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        return linear

    def _add(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *outer, last = path.split(".")
        for part in outer:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, module)

    def at(self, place: str) -> list[nn.Module]:
        """The modules that fill a place, looked up anew: peft exchanges them."""
        return [self.get_submodule(path) for path in self.places[place]]

    @property
    def projections(self) -> list[str]:
        """Paths of the transformer layers' matrices, which low-rank adapters are for."""
        return [
            p for place, paths in self.places.items() if place.startswith("layers.") and "norm" not in place for p in paths
        ]

    def forward(self, ids: Tensor, positions: Tensor, visible: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [N, V] of `rows` [N], numbers into the batch's B * T states; [B, T, V] without.

        ids, positions: [B, T]. visible: bool [B, 1, T or 1, T], which keys a query attends to. The state at position i
        predicts the token at i + shift. The head is part of the call because DDP and FSDP act on that.
        """
        cos, sin = self._rope(positions)
        x = self.at("embed")[0](ids)
        for i in range(self.spec.layers):
            if self.checkpointing and self.training:
                x = recompute(self._layer, i, x, cos, sin, visible, use_reentrant=False)
            else:
                x = self._layer(i, x, cos, sin, visible)
        states = self.at("norm")[0](x)
        return self.head(states if rows is None else states.flatten(0, 1)[rows])

    def head(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., C]."""
        if "head" in self.places:
            return self.at("head")[0](states)
        return F.linear(states, self.at("embed")[0].weight.to(states.dtype))

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [B, 1, T, D], halves side by side."""
        exponent = torch.arange(0, self.spec.head_dim, 2, device=positions.device).float() / self.spec.head_dim
        angle = positions.float()[:, None, :, None] * self.spec.rope_theta**-exponent
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    def _layer(self, i: int, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        s, here = self.spec, f"layers.{i}."
        normed = self.at(here + "attn_norm")[0](x)
        q, k, v = (m(normed).unflatten(-1, (-1, s.head_dim)).transpose(1, 2) for m in self.at(here + "qkv"))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if s.kv_heads < s.heads:
            k, v = (z.repeat_interleave(s.heads // s.kv_heads, 1) for z in (k, v))
        with sdpa_kernel(BACKENDS):
            mixed = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=visible)
        x = x + self.at(here + "out")[0](mixed.transpose(1, 2).flatten(2))
        gate, up = (m(self.at(here + "ffn_norm")[0](x)) for m in self.at(here + "gate_up"))
        return x + self.at(here + "down")[0](F.silu(gate) * up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def load_network(name: str, dtype: torch.dtype = torch.float32) -> tuple[Network, PreTrainedTokenizerFast, Path]:
    """The trainable network of a shipped name, a folder or a hub id, its tokenizer and its folder.

    Raises ValueError for a checkpoint that lacks tensors, has others than the family, or holds numbers that are no weights.
    """
    folder = find_folder(name)
    config = read_object(folder / "config.json")
    family, tokenizer = read_family(config, folder), load_tokenizer(folder)
    if tokenizer is None:
        raise FileNotFoundError(f"{folder}: no tokenizer.json, nor vocab.json with merges.txt")
    spec = family.spec(config, special_ids(tokenizer))
    table = family.names(spec)
    check_shapes(folder, tensor_shapes(folder), expected_shapes(table, parameter_shapes(spec)), family.optional(spec))
    tensors = {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}
    if names := sorted(name for name in table if not tensors[name].isfinite().all()):
        raise ValueError(f"{folder}: NaN or infinite weights in {quote(names)}")
    return Network(family, spec, {name: tensors[name].to(dtype) for name in table}), tokenizer, folder


def save_network(tensors: dict[str, Tensor], source: Path, folder: Path) -> None:
    """Write `tensors` as a checkpoint in `source`'s format and number format, with its other files."""
    kinds = {name: tensor.dtype for path in shards(source) for name, tensor in load_file(path).items()}
    own = {name: tensor.detach().to("cpu", kinds[name]).contiguous() for name, tensor in tensors.items()}
    with whole.filling(folder) as partial:
        for path in source.iterdir():
            if path.is_file() and path.suffix in {".json", ".jinja", ".txt"} and not path.name.endswith(".index.json"):
                shutil.copyfile(path, partial / path.name)
        save_file(own, partial / "model.safetensors", metadata={"format": "pt"})
