# SPDX-License-Identifier: Apache-2.0
"""Published safetensors, unchanged, straight into the fused parameters on their device.

Tensors are streamed one at a time, so that the peak is the weights on their device and one tensor on the host. Each
checkpoint tensor must have a place and each parameter must be filled: an incomplete or foreign checkpoint is an error that
names the tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastdllm.models.spec import Family, ModelSpec
from fastdllm.models.transformer import Transformer


def shards(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files; a shard that the index names and that is missing is an error."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [n for n in names if not (folder / n).exists()]
        if missing:
            raise FileNotFoundError(f"{folder}: model.safetensors.index.json names {', '.join(missing)}, not found")
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors file (only this format is read)")
    return files


def load_weights(folder: Path, family: Family, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Build the network of `spec` on `device` in `dtype` and fill it from `folder`.

    Raises ValueError naming the tensor that is missing, unexpected, of a wrong shape or unreadable.
    """
    network = Transformer(spec, dtype, "meta").to_empty(device=device)
    if spec.tied_head:
        network.head.weight = network.embed.weight
    parameters = dict(network.named_parameters())
    table, optional, seen = family.names(spec), family.optional(spec), set()
    for path in shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for name in names:
                if name not in table:
                    if name in optional:
                        continue
                    raise ValueError(f"{path.name}: unexpected tensor {name!r} for the family {spec.family!r}")
                target, row = table[name]
                # Opened anew for each tensor: an open file keeps every page that was read, a second copy of the weights.
                # The tensor is a view of the file and copied from there: no second copy on the device, none on the host
                # unless the number format changes.
                with safe_open(path, framework="pt") as file:
                    tensor = file.get_tensor(name)
                expected = expected_shape(table, parameters, name)
                if list(tensor.shape) != expected:
                    raise ValueError(
                        f"{path.name}: tensor {name!r} has shape {list(tensor.shape)}, config.json asks for {expected}"
                    )
                parameters[target].data[row : row + expected[0]].copy_(tensor)
                del tensor
                seen.add(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    missing = sorted(set(table) - seen)
    if missing:
        raise ValueError(f"{folder}: the checkpoint lacks {len(missing)} tensor(s), the first is {missing[0]!r}")
    network.requires_grad_(False)
    return network.eval()


def expected_shape(table: dict[str, tuple[str, int]], parameters: dict[str, torch.nn.Parameter], name: str) -> list[int]:
    """Shape of the slice that `name` fills: up to the next tensor of the same parameter, or to its end."""
    target, row = table[name]
    later = [r for t, r in table.values() if t == target and r > row]
    shape = parameters[target].shape
    return [min(later, default=shape[0]) - row, *shape[1:]]
