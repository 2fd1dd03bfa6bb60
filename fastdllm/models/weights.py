# SPDX-License-Identifier: Apache-2.0
"""Published safetensors, unchanged, straight into the fused parameters on their device.

The shards' headers are compared with the family's table before any memory is taken: each checkpoint tensor must have a
place and each place must be filled, in the right shape, by one tensor of floats. Tensors are then streamed one at a time, so
that the peak is the weights on their device and one tensor on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdllm.models import int4
from fastdllm.models.files import check_regular, present, read_bytes, read_object
from fastdllm.models.spec import Family, ModelSpec
from fastdllm.models.transformer import Transformer

if TYPE_CHECKING:
    from fastdllm.models.adapters import Adapter

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
# What a tensor of another architecture gives away, in its name.
FOREIGN = {
    "q_norm": "norms on queries and keys (Qwen3's network, Dream-reasoner)",
    "expert": "a mixture of experts",
    "vision": "a vision tower",
    "lora_": "a LoRA adapter",
    "scales": "quantisation",
}


def shards(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: those of the index, else model.safetensors, else all but an adapter's.

    Raises FileNotFoundError for a shard that the index names and that is missing, ValueError for a name outside the folder.
    """
    if present(folder / INDEX):
        table = read_object(folder / INDEX).get("weight_map")
        if not isinstance(table, dict):
            raise ValueError(f"{folder / INDEX}: weight_map must be an object")
        for name in table.values():  # a null is damage here: it stands for a tensor
            if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX}: {name!r} is not the name of a .safetensors file in the same folder")
        names = sorted(set(table.values()))
        if missing := [n for n in names if not (folder / n).exists()]:
            raise FileNotFoundError(f"{folder}: {INDEX} names {', '.join(missing)}, not found")
        if not names:
            raise ValueError(f"{folder / INDEX}: weight_map is empty")
        return [folder / n for n in names]
    if present(folder / SINGLE):
        return [folder / SINGLE]
    if files := sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_")):
        return files
    others = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.npz") for p in folder.glob(kind))
    found = f"; {', '.join(others[:3])} must be converted" if others else ""
    raise FileNotFoundError(f"{folder}: no .safetensors file (only this format is read){found}")


def open_shard(path: Path) -> safe_open:
    """The opened file. Raises ValueError naming it when it is a git-lfs pointer or not safetensors."""
    try:
        check_regular(path)
        if path.stat().st_size < 1024:
            read_bytes(path)  # raises for a pointer
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    except OSError as error:
        raise type(error)(f"{path}: cannot be read ({error})") from error


def headers(paths: list[Path]) -> dict[str, tuple[Path, list[int]]]:
    """Tensor name -> (its file, its shape). Raises ValueError for a tensor in two files, or one that is not of floats (of
    a packed weight's words: not of int32)."""
    found: dict[str, tuple[Path, list[int]]] = {}
    for path in paths:
        with open_shard(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                if name in found:
                    raise ValueError(f"tensor {name!r} is in {found[name][0].name} and again in {path.name}")
                allowed = ("I32",) if name.rpartition(".")[2] in int4.WORDS else FLOATS
                if part.get_dtype() not in allowed:
                    raise ValueError(f"{path}: tensor {name!r} holds {part.get_dtype()}, not {' or '.join(allowed)}")
                found[name] = path, part.get_shape()
    return found


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of `Transformer(spec)`, without building it; of a matrix that is filled by columns also that
    of its transpose, under its name and ".T"."""
    q, kv, width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.width
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (spec.vocab, width), "norm": (width,)}
    if not spec.tied_head:
        shapes["head.weight"] = (spec.vocab, width)
    for i in range(spec.layers):
        p = f"layers.{i}."
        shapes |= {p + "attn_norm": (width,), p + "ffn_norm": (width,), p + "qkv.weight": (q + 2 * kv, width)}
        shapes |= {p + "out.weight": (width, q), p + "gate_up.weight": (2 * spec.inner(i), width)}
        shapes |= {p + "down.weight": (width, spec.inner(i)), p + "down.weight.T": (spec.inner(i), width)}
        if spec.experts and i >= spec.experts.dense:
            shapes |= {p + "router": (spec.experts.count, width), p + "router_bias": (spec.experts.count,)}
        if spec.qk_norm:
            shapes |= {p + "q_norm": (spec.head_dim,), p + "k_norm": (spec.head_dim,)}
        if spec.qkv_bias:
            shapes[p + "qkv.bias"] = (q + 2 * kv,)
    return shapes


def expected_shapes(table: dict[str, tuple[str, int]], parameters: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """Shape of the slice that each published tensor fills: up to the next tensor of the same parameter, or to its end."""
    starts: dict[str, list[int]] = {}
    for target, row in table.values():
        starts.setdefault(target, []).append(row)
    expected = {}
    for name, (target, row) in table.items():
        shape = parameters[target]
        stop = min((r for r in starts[target] if r > row), default=shape[0])
        expected[name] = [shape[1], stop - row] if target.endswith(".T") else [stop - row, *shape[1:]]
    return expected


def place_of(parameters: Mapping[str, Tensor], target: str, start: int, shape: list[int]) -> Tensor:
    """Where a tensor of `shape` goes that fills a parameter from the row `start` on, or from that column on (`.T`)."""
    if target.endswith(".T"):
        return parameters[target.removesuffix(".T")].data[:, start : start + shape[1]]
    return parameters[target].data[start : start + shape[0]]


def check_headers(
    folder: Path, family: Family, spec: ModelSpec, found: dict[str, tuple[Path, list[int]]]
) -> dict[str, tuple[str, int]]:
    """The family's table, once every tensor of the files has its place and shape in it. Raises ValueError naming the first
    that is unexpected, missing or of a wrong shape."""
    table, optional = family.names(spec), family.optional(spec)
    if spec.tied_head and family.tied:
        optional = optional | {family.tied}
    for name in found:
        if name not in table and name not in optional:
            foreign = {key: what for key, what in FOREIGN.items() if not (key == "expert" and family.experts)}
            hint = next(
                (f"; it belongs to {what}, which is not supported" for key, what in foreign.items() if key in name), ""
            )
            raise ValueError(f"{found[name][0]}: unexpected tensor {name!r} for the family {spec.family!r}{hint}")
    if missing := sorted(set(table) - set(found)):
        raise ValueError(f"{folder}: the checkpoint lacks {len(missing)} tensor(s), the first is {missing[0]!r}")
    expected = expected_shapes(table, parameter_shapes(spec))
    if family.tied in found and spec.tied_head:
        expected[family.tied] = [spec.vocab, spec.width]
    for name, shape in expected.items():
        path, has = found[name]
        if has != shape:
            raise ValueError(f"{path}: tensor {name!r} has shape {has}, config.json asks for {shape}")
    return table


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor, a view of the file. The file is opened anew for each: an open file keeps every page that was read, a
    second copy of the weights."""
    with open_shard(path) as file:
        return file.get_tensor(name)


def check_finite(tensor: Tensor, path: Path, name: str) -> None:
    """Raises ValueError when a stored tensor has NaN or infinity, or values beyond the number format it is loaded in."""
    low, high = torch.aminmax(tensor)  # one pass, no copy; NaN wins
    if not bool(torch.isfinite(torch.stack([low, high])).all()):
        raise ValueError(f"{path}: tensor {name!r} has NaN or infinity, or values beyond {tensor.dtype}")


def fill_packed(module: torch.nn.Module, row: int, parts: dict[str, tuple[Path, str]], layout: str, name: str) -> None:
    """Convert a weight in 4 bits, `name` of the checkpoint, and put it and its scale into `module` from `row` on.

    Raises ValueError naming file and tensor where its parts do not fit, or the scale is not finite.
    """
    tensors = {part: read_tensor(*where).to(module.weight.device) for part, where in parts.items()}
    try:
        weight, scale = int4.convert(tensors, layout)
    except ValueError as error:
        raise ValueError(f"{parts['qweight'][0]}: {name!r} in 4 bits: {error}") from error
    rows = slice(row, row + len(weight))
    module.weight.data[rows].copy_(weight)
    check_finite(module.scale[rows].copy_(scale).float(), *parts["scales"])  # as products are computed


def load_weights(
    folder: Path,
    family: Family,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    adapter: Adapter | None = None,
    layout: str | None = None,
) -> Transformer:
    """Build the network of `spec` on `device` in `dtype` and fill it from `folder`.

    adapter: merged into the tensors as they are read.
    layout: of a checkpoint in 4 bits, one of `int4.LAYOUTS`.
    Raises ValueError naming the tensor that is missing, unexpected, doubled, of a wrong shape or not finite.
    """
    found = headers(shards(folder))
    if layout is None and any(name.endswith(".qweight") for name in found):
        raise ValueError(f"{folder}: weights as GPTQ and AWQ pack them, but no quantization_config in config.json says how")
    packed = {} if layout is None else int4.take_packed(found, family.names(spec), layout)
    if packed and adapter is not None:
        raise ValueError(f"{folder}: an adapter cannot be merged into weights in 4 bits")
    if packed and spec.experts:
        raise ValueError(f"{folder}: a mixture of experts is not read in 4 bits")
    table = check_headers(folder, family, spec, found)
    expected = expected_shapes(table, parameter_shapes(spec))
    if adapter is not None:
        adapter.check(expected)
    network = Transformer(spec, dtype, "meta")
    try:
        int4.make_room(network, table, {name: read_tensor(*parts["scales"]) for name, parts in packed.items()})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    network.to_empty(device=device)
    if spec.tied_head:
        network.head.weight = network.embed.weight
    parameters = dict(network.named_parameters())
    for name, (path, _) in found.items():
        if name not in table:
            continue
        target, row = table[name]
        if name in packed:
            fill_packed(network.get_submodule(target.removesuffix(".weight")), row, packed[name], str(layout), name)
            continue
        tensor = read_tensor(path, name)
        tensor = tensor if adapter is None else adapter(name, tensor)
        place = place_of(parameters, target, row, expected[name])
        # Copied from the file to its place: no second copy on the device, none on the host unless the number format changes.
        place.copy_(tensor)
        del tensor
        check_finite(place, path, name)
    if spec.tied_head and family.tied in found:
        path, embedding = found[family.tied][0], network.embed.weight.data
        if not torch.equal(read_tensor(path, family.tied).to(device, dtype), embedding):
            raise ValueError(f"{path}: config.json ties the head to the embedding, but {family.tied!r} differs from it")
    network.requires_grad_(False)
    return network.eval()
