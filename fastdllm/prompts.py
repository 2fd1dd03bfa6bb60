# SPDX-License-Identifier: Apache-2.0
"""From whatever people pass (texts, conversations, ids with or without padding) to token ids.

`encode` is the one way in for generation, `encode_pair` for scores. What they do with texts and messages is in
`conversations.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdllm.conversations import Messages, encode_literally, encode_messages, encode_text, named, render, without_tokenizer
from fastdllm.fields import is_integer, shown

if TYPE_CHECKING:
    from fastdllm.models import Model

__all__ = [
    "Messages",
    "Prompts",
    "check_model",
    "encode",
    "encode_literally",
    "encode_messages",
    "encode_pair",
    "encode_text",
    "ids_row",
    "padded",
    "prefix_id",
    "render",
    "split_join",
]

Ids = Sequence[int] | Tensor
Prompts = str | Sequence[str] | Messages | Sequence[Messages] | Ids | Sequence[Ids] | Mapping

ALLOWED = (
    "allowed are a text, a conversation (a list of {'role', 'content'}), token ids (a list, an array or a tensor of "
    "integers, [P] or [B, P]), a list of one of these, and what a tokenizer returns (input_ids, attention_mask)"
)

IDS = "token ids are integers"
MASK = "a mask has 1 at tokens and 0 at padding"


def encode(model: Model, prompts: Prompts, attention_mask: Any = None) -> list[Tensor]:
    """Prompts as 1-D LongTensors on the CPU.

    model: what `load` returned; its tokenizer and chat template are used.
    prompts: one of these, or a list of them:
        a text, which is tokenised as it stands;
        a conversation: messages with "role" and "content", which go through the chat template (the content is a text or a
        list of {"type": "text", "text"} parts);
        token ids, [P] or [B, P];
        what a tokenizer returns, whose padding on the left or right is removed.
    attention_mask: of ids [B, P]: 1, or 0 on padding, as integers, booleans or floats.

    Raises ValueError for anything else, for an empty prompt and for ids outside the vocabulary.
    """
    check_model(model)
    out = []
    for i, prompt in enumerate(_listed(prompts, attention_mask)):
        if isinstance(prompt, Tensor):
            ids = prompt
        elif model.tokenizer is None:
            raise ValueError(f"model {model.name!r} has no tokenizer; pass token ids instead of text{without_tokenizer()}")
        elif isinstance(prompt, str):
            ids = torch.tensor(encode_text(model, prompt), dtype=torch.long)
        else:
            ids = encode_messages(model, prompt)
        if not len(ids):
            raise ValueError(f"a prompt is empty; at least one token is needed (prompt {i})")
        if ids.min() < 0 or ids.max() >= model.spec.vocab:  # sync: bad ids would read outside the embedding
            raise ValueError(f"a prompt has token ids outside 0..{model.spec.vocab - 1} (prompt {i})")
        out.append(ids)
    if not out:
        raise ValueError("prompts is empty")
    return out


def encode_pair(model: Model, context: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Ids of a context [P] and of what may follow it [L], 1-D LongTensors on the CPU.

    context: a text, a conversation, token ids (none are allowed), or what a tokenizer returns.
    target: a text or token ids; may be empty.

    Two texts are tokenised as one and cut where the target begins (`split_join`). After a conversation the target is what
    the assistant says, and after ids it stands by itself. An empty text as context is the token that texts begin with.

    Raises ValueError for anything else.
    """
    texts = isinstance(context, str), isinstance(target, str)
    if any(texts) and model.tokenizer is None:
        raise ValueError(f"model {model.name!r} has no tokenizer; pass token ids instead of text{without_tokenizer()}")
    if all(texts):
        before, after = split_join(partial(encode_text, model), context, target, prefix_id(model))
        return torch.tensor(before, dtype=torch.long), torch.tensor(after, dtype=torch.long)
    spoken = isinstance(context, list | tuple) and any(isinstance(entry, Mapping) for entry in context)
    if texts[0] and not context:
        ids = torch.tensor([prefix_id(model)])
    elif texts[0] or spoken or isinstance(context, Mapping):
        (ids,) = encode(model, [context])
    else:
        ids = ids_row(context, "context")
    if not texts[1]:
        return ids, ids_row(target, "target")
    said = encode_literally(model, target) if spoken else encode_text(model, target)
    return ids, torch.tensor(said, dtype=torch.long)


def split_join(encode: Callable[[str], list[int]], context: str, target: str, prefix: int) -> tuple[list[int], list[int]]:
    """Ids of a context [P], P > 0, and of what follows it [L]: one text's own ids, cut where the target begins.

    Where a token spans the join, the cut is before it, so that nothing of the target is lost: the target begins with the
    first token that the context by itself does not have. As lm-eval does, blanks at the end of the context belong to the
    target, unless that would take in more of the context. A target that is empty has no ids.

    encode: a text to its ids.
    prefix: the token before a text that has no context.
    """
    whole = encode(context + target)
    if not target:
        return whole or [prefix], []
    start = _common(whole, alone := encode(context.rstrip())) if context else 0
    if context and start < len(alone):
        start = max(start, _common(whole, encode(context)))
    if start == len(whole):
        raise ValueError(f"the tokenizer makes no token of the continuation {target[:40]!r}")
    if start == 0 and whole[0] == prefix and len(whole) > 1:
        start = 1  # the text brings its own beginning
    return whole[:start] or [prefix], whole[start:]


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def prefix_id(model: Model) -> int:
    """The token before the first of a text: the tokenizer's BOS, or the model's stop token where it has none. ValueError for
    a model that has neither."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if bos is None and not model.spec.stop_ids:
        raise ValueError(f"model {model.name!r} has no token that a text begins with; give a context")
    return int(model.spec.stop_ids[0] if bos is None else bos)


def check_model(model: Any) -> None:
    """ValueError for what is no `Model`, with the way to one."""
    if hasattr(model, "network") and hasattr(model, "spec"):
        return
    if isinstance(model, str):
        raise ValueError(f"model={shown(model)} is a name; pass the model itself, fastdllm.load({shown(model)})")
    kind = type(model).__name__
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or "folder or hub id"
    raise ValueError(f"model is of type {kind}; pass what fastdllm.load({name!r}) returns")


def padded(model: Model, rows: list[Tensor], given: Any = None) -> Tensor:
    """Prompts as one tensor [B, P], shorter ones with the pad id on the left: what the published functions return begins
    with it.

    given: the ids [B, P] that the rows were, padding included, or what a tokenizer returned; P is theirs, so that the
    answers begin where a caller looks for them.
    """
    width = max(*map(len, rows), _columns(given.get("input_ids") if isinstance(given, Mapping) else given))
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=model.spec.pad_id) for row in rows])


def _columns(ids: Any) -> int:
    """P of ids [B, P], 0 of anything else."""
    if isinstance(ids, Tensor | np.ndarray):
        return ids.shape[1] if ids.ndim == 2 else 0
    rows = ids if isinstance(ids, list | tuple) else []
    return max((len(row) for row in rows if isinstance(row, list | tuple) and row and isinstance(row[0], int)), default=0)


# From one of many shapes to a list of texts, conversations and id tensors [P].


Prompt = str | Messages | Tensor  # one of them


def _listed(prompts: Any, attention_mask: Any) -> list[Prompt]:
    if attention_mask is not None:
        if isinstance(prompts, Mapping):
            raise ValueError("attention_mask is given twice: as an argument, and in prompts")
        prompts = {"input_ids": prompts, "attention_mask": attention_mask}
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return _tokenized(prompts, "prompts")
    if isinstance(prompts, np.ndarray) and prompts.dtype.kind == "U":
        prompts = prompts.tolist()
    if isinstance(prompts, Tensor | np.ndarray):
        return list(_id_rows(prompts, "prompts"))
    if not isinstance(prompts, list | tuple):
        raise ValueError(f"prompts is {named(prompts)}; {ALLOWED}")
    if prompts and all(_is_message(item) for item in prompts):
        return [prompts]
    if prompts and all(is_integer(item) for item in prompts):
        return list(_id_rows(prompts, "prompts"))
    return [prompt for i, item in enumerate(prompts) for prompt in _one(item, f"prompt {i}")]


def _one(item: Any, name: str) -> list[Prompt]:
    """One entry of a list of prompts, in a list."""
    if isinstance(item, str):
        return [item]
    rows: list[Prompt] = []
    if isinstance(item, Mapping) and not _is_message(item):
        rows = _tokenized(item, name)
    elif isinstance(item, Tensor | np.ndarray) or (isinstance(item, list | tuple) and item and all(map(is_integer, item))):
        rows = list(_id_rows(item, name))
    elif isinstance(item, list | tuple) and any(isinstance(entry, Mapping) for entry in item):
        return [item]
    if len(rows) != 1:
        raise ValueError(f"{name} is {named(item)}; {ALLOWED}")
    return rows


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and ("role" in item or "content" in item)


def _tokenized(given: Mapping[str, Any], name: str) -> list[Prompt]:
    """The prompts of a tokenizer's answer (or of a dict of that shape), without padding."""
    if "input_ids" not in given:
        what = "one message; pass a list of messages" if _is_message(given) else f"{named(given)}; {ALLOWED}"
        raise ValueError(f"{name} is {what}")
    rows: list[Any] = list(_id_rows(given["input_ids"], "input_ids"))
    if given.get("attention_mask") is None:
        return rows
    masks = list(_id_rows(_whole(given["attention_mask"]), "attention_mask", MASK))
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        shapes = [[len(row) for row in side] for side in (masks, rows)]
        raise ValueError(f"attention_mask has rows of {shown(shapes[0])} entries, input_ids of {shown(shapes[1])}")
    return [_without_padding(row, mask, i) for i, (row, mask) in enumerate(zip(rows, masks, strict=True))]


def _without_padding(ids: Tensor, mask: Tensor, row: int) -> Tensor:
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError(f"attention_mask has values other than 0 and 1 in row {row}; {MASK}")
    kept = mask.nonzero()[:, 0]
    if len(kept) and int(kept[-1] - kept[0]) + 1 != len(kept):
        raise ValueError(f"attention_mask has a gap in row {row}; 0 is for padding on the left or on the right")
    return ids[kept]


def _whole(mask: Any, depth: int = 2) -> Any:
    """A mask whose floats are integers. ValueError for one that has others than 0.0 and 1.0: -inf, for one, where positions
    are hidden, which is not what 0 means here."""
    if isinstance(mask, list | tuple) and depth:
        return [_whole(item, depth - 1) for item in mask]
    if isinstance(mask, float | np.floating | np.bool_) and mask in (0, 1):
        return int(mask)
    if isinstance(mask, np.ndarray) and mask.dtype.kind == "f":
        mask = torch.from_numpy(mask.astype(np.float64))
    if isinstance(mask, Tensor) and mask.is_floating_point() and not mask.is_meta and mask.layout == torch.strided:
        mask = mask.detach().to("cpu", torch.float64)  # sync: inputs, once
        if ((mask != 0) & (mask != 1)).any():
            raise ValueError(f"attention_mask has values other than 0 and 1; {MASK}")
        return mask.long()
    return mask


def _id_rows(given: Any, name: str, rule: str = IDS) -> Iterator[Tensor]:
    """Rows [P] int64 of ids [P], [B, P] or of rows of different lengths. ValueError, with the rule, for what are no integers
    (or, of a mask, booleans)."""
    bools = rule == MASK
    if isinstance(given, list | tuple):
        nested = given and all(isinstance(item, list | tuple | Tensor | np.ndarray) for item in given)
        yield from (_id_row(item, name, rule) for item in given) if nested else [_id_row(given, name, rule)]
        return
    if isinstance(given, np.ndarray) and given.dtype.kind in ("iub" if bools else "iu"):
        given = torch.from_numpy(given.astype(np.int64))
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} is {named(given)}; {rule}")
    whole = not (given.dtype.is_floating_point or given.dtype.is_complex or given.is_quantized)
    if not whole or (given.dtype == torch.bool and not bools):
        raise ValueError(f"{name} is {named(given)}; {rule}")
    if given.is_meta or given.layout != torch.strided:
        raise ValueError(f"{name} is {named(given)} without plain data; it must be a dense tensor")
    if given.ndim not in (1, 2):
        raise ValueError(f"{name} is {named(given)}; {'a mask is' if bools else 'ids are'} [P] or [B, P]")
    given = given.detach().to("cpu", torch.long)  # sync: inputs, once
    yield from given if given.ndim == 2 else [given]


def ids_row(given: Any, name: str) -> Tensor:
    """Ids [P] int64 on the CPU from a list, an array or a tensor of integers, P >= 0. ValueError for the rest."""
    if isinstance(given, list | tuple) and not given:
        return torch.empty(0, dtype=torch.long)
    if isinstance(given, Tensor | np.ndarray) and given.shape == (0,):
        return torch.empty(0, dtype=torch.long)
    if not isinstance(given, Tensor | np.ndarray | list | tuple):
        raise ValueError(f"{name} is {named(given)}; {IDS}")
    return _id_row(given, name, IDS)


def _id_row(given: Any, name: str, rule: str) -> Tensor:
    if isinstance(given, Tensor | np.ndarray):
        rows = list(_id_rows(given, name, rule))
        if len(rows) != 1:
            raise ValueError(f"{name} has an entry that is {named(given)}; one row of it is allowed there")
        return rows[0]
    bools = rule == MASK
    if not all(is_integer(item) or (bools and isinstance(item, bool)) for item in given):
        raise ValueError(f"{name} is {named(given)}; {rule}")
    if not all(-(2**63) <= item < 2**63 for item in given):
        raise ValueError(
            f"{name} has {'values other than 0 and 1' if bools else 'token ids outside the vocabulary'}; {rule}"
        )
    return torch.tensor([int(item) for item in given], dtype=torch.long)
