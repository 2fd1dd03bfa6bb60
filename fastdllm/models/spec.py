# SPDX-License-Identifier: Apache-2.0
"""The closed list of differences between the families.

One network (`transformer.py`) runs them all; a new family is a function from its config.json to a `ModelSpec` and a table of
weight names.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdllm.fields import shown
from fastdllm.models.files import Fields

# Upper ends of what a network may be, far above every published one: a hostile config.json is refused at once.
# Under these names the tokenizer's own mask and end of a text are among the ids that a family gets.
MASK_ROLE, END_ROLE = "mask_token", "eos_token"
LAYERS, WIDTH, HEADS, HEAD_DIM, VOCAB, POSITIONS = 1024, 2**18, 2**12, 2**12, 2**24, 2**22
EXPERTS = 2**12


@dataclass(frozen=True)
class Stretch:
    """How rotary frequencies are stretched to a longer context; `rope.py` says what each kind makes of its numbers."""

    kind: str  # "linear", "llama3" or "yarn"
    factor: float
    original: int = 0  # the context it was trained with before
    low: float = 0.0
    high: float = 0.0
    truncate: bool = True
    scale: float = 1.0  # on cosine and sine


@dataclass(frozen=True)
class Experts:
    """The feed-forward of layers in which some of many experts work for a token.

    count, active: how many a layer has, and how many of them work for a token. inner: channels of one.
    shared: channels that work for every token besides.
    dense: so many layers, the first ones, have one feed-forward of `ModelSpec.ffn` channels instead.
    score: "softmax" (OLMoE, arXiv 2409.02060): the most probable ones, by their probabilities as they are. "sigmoid"
        (DeepSeek-V3, arXiv 2412.19437): each expert has a score and a bias, which only chooses; the scores of the chosen
        ones are made to add up to `scale`.
    groups, active_groups: with "sigmoid", only experts of the best groups are chosen, by the sum of a group's best two.
    """

    count: int
    active: int
    inner: int
    shared: int = 0
    dense: int = 0
    score: str = "softmax"
    groups: int = 1
    active_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("count", 1, EXPERTS),
            ("groups", 1, self.count),
            ("active_groups", 1, self.groups),
            ("active", 1, self.count // self.groups * self.active_groups),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"experts: {name}={getattr(self, name)} is outside of {low} to {high}")
        if self.count % self.groups or (self.groups > 1 and self.count // self.groups < 2):
            raise ValueError(f"experts: {self.count} cannot be divided into {self.groups} groups of two or more")

    def starts(self) -> dict[str, int]:
        """The published name of each expert -> its first channel."""
        return {f"experts.{e}.": e * self.inner for e in range(self.count)}


@dataclass(frozen=True)
class ModelSpec:
    """Shapes, conventions and special ids of one checkpoint.

    vocab: rows of the embedding.
    shift: row j of a forward over positions [s, ...) predicts position s + j + shift.
    block_causal: the block size of a model whose queries see only their own and earlier blocks; 0 for a bidirectional model.
    causal_context: finished tokens see only those before them; the open block sees itself in both directions. A forward that
        reads from left to right predicts the next token, whatever `shift` is.
    grid_at_prompt: whether a block-causal model counts its blocks from the prompt's end instead of from position 0; the
        first block of the prompt may then be short.
    qk_norm: each query and key head is normalised before the rotation (Qwen3).
    stretch: how the rotation reaches a longer context than it was trained for.
    mask_id, stop_ids: token ids.
    defaults: the family's decoding defaults.
    experts: of the feed-forward, None for a dense one.
    ffn: inner channels of a dense feed-forward; where all layers have experts, of one expert.
    rotary: so many channels of each head are rotated, the first ones; 0 for all.
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_length: int
    rms_eps: float
    rope_theta: float
    qkv_bias: bool
    tied_head: bool
    shift: int
    block_causal: int
    mask_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qk_norm: bool = False
    stretch: Stretch | None = None
    causal_context: bool = False
    grid_at_prompt: bool = False
    experts: Experts | None = None
    rotary: int = 0

    def inner(self, layer: int) -> int:
        """Inner channels of a layer's feed-forward, of all experts together."""
        e = self.experts
        return self.ffn if e is None or layer < e.dense else e.count * e.inner + e.shared

    def working(self, layer: int) -> int:
        """Those of them that work for a token."""
        e = self.experts
        return self.ffn if e is None or layer < e.dense else e.active * e.inner + e.shared

    def __post_init__(self) -> None:
        for name, low, high in (
            ("layers", 1, LAYERS),
            ("width", 1, WIDTH),
            ("heads", 1, HEADS),
            ("kv_heads", 1, HEADS),
            ("head_dim", 2, HEAD_DIM),
            ("ffn", 1, WIDTH * 8),
            ("rotary", 0, self.head_dim),
            ("vocab", 2, VOCAB),
            ("max_length", 1, POSITIONS),
            ("block_causal", 0, POSITIONS),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{self.family}: {name}={getattr(self, name)} is outside of {low} to {high}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.family}: {self.heads} heads are no multiple of {self.kv_heads} key-value heads")
        for name in ("head_dim", "rotary"):
            if getattr(self, name) % 2:
                raise ValueError(f"{self.family}: {name}={getattr(self, name)} is odd; the rotation needs pairs")
        for name, low, high in (("rms_eps", 0.0, 1.0), ("rope_theta", 1.0, math.inf)):
            if not low < getattr(self, name) < high:
                raise ValueError(f"{self.family}: {name}={getattr(self, name)} must be above {low:g} and below {high:g}")
        for name, ids in (("mask", [self.mask_id]), ("pad", [self.pad_id]), ("eos", self.stop_ids)):  # as in config.json
            if bad := [i for i in ids if not 0 <= i < self.vocab]:
                raise ValueError(f"{self.family}: {name}_token_id={bad[0]} is outside the vocabulary of {self.vocab} rows")
        if self.mask_id in self.stop_ids:
            raise ValueError(f"{self.family}: mask_id={self.mask_id} is a stop token too")


@dataclass(frozen=True)
class Family:
    """How a family's published files become a model.

    read: (config, ids) -> `ModelSpec`, from config.json and the tokenizer's added tokens (text -> id).
    names: spec -> {published tensor name: (our parameter, first row that it fills)}; after a parameter's name and ".T" the
        number is of its first column.
    optional: spec -> names of tensors that some checkpoints carry and that are not needed.
    tied: the name of the head that a tied checkpoint may carry a second time.
    harmless: fields of config.json that say nothing about the network.
    block_field: where config.json says the block size, for families whose block size is a choice.
    experts: whether its layers are mixtures of experts.
    """

    read: Callable[[Fields, Mapping[str, int]], ModelSpec]
    names: Callable[[ModelSpec], dict[str, tuple[str, int]]]
    optional: Callable[[ModelSpec], set[str]]
    tied: str = ""
    harmless: frozenset[str] = frozenset()
    block_field: str = ""
    experts: bool = False

    def spec(self, config: Mapping[str, Any], ids: Mapping[str, int]) -> ModelSpec:
        """The spec of a config.json. Raises ValueError naming a field that is missing, wrong, or not supported."""
        fields = config if isinstance(config, Fields) else Fields(config)
        spec = self.read(fields, ids)
        check_layer_types(fields, spec.layers)
        fields.check_rest(self.harmless)
        return spec


def check_layer_types(config: Fields, layers: int) -> None:
    """Raises ValueError for a layer that does not attend to everything, and for a list of more or fewer than `layers`."""
    types = config.names("layer_types")
    if set(types) - {"full_attention"}:
        raise config.wrong("layer_types", "only 'full_attention' is supported")
    if "layer_types" in config and len(types) != layers:
        raise config.wrong("layer_types", f"the network has {layers} layers")
    slides = config.flag("use_sliding_window", "sliding_window" in config)  # Qwen's switch; Mistral heeds a width by itself
    if slides:
        name = "use_sliding_window" if "use_sliding_window" in config else "sliding_window"
        raise config.wrong(name, "only null or use_sliding_window=False is supported")


def mask_id(config: Fields, ids: Mapping[str, int], text: str, published: int) -> int:
    """config.json's mask_token_id, else the id of the token `text` or of the tokenizer's own mask, else (without a
    tokenizer) the published id.

    Raises ValueError when config.json and the tokenizer disagree, or when a tokenizer has no such token.
    """
    known = ids.get(text, ids.get(MASK_ROLE))
    if "mask_token_id" not in config:
        if known is None and ids:
            raise ValueError(f"{config.where} has no mask_token_id, and the tokenizer has no token {text!r}")
        return published if known is None else known
    given = config.integer("mask_token_id", 0, VOCAB)
    if known is not None and known != given:
        raise config.wrong("mask_token_id", f"the tokenizer's mask {text!r} is {known}")
    return given


def with_generation(config: Fields, generation: Fields, ids: Mapping[str, int]) -> Fields:
    """config.json with the stop tokens of generation_config.json besides its own: transformers ends answers at those.

    generation: the fields of generation_config.json. ids: the tokenizer's added tokens; empty where it is not known. A stop
    token that is none of them ends nothing, and a warning says so. Raises ValueError for another mask than config.json's.
    """
    mask, known = generation.integer("mask_token_id", 0, VOCAB, None), config.peek("mask_token_id")
    if mask is not None and mask != (known := ids.get(MASK_ROLE) if known is None else known) and known is not None:
        raise generation.wrong("mask_token_id", f"the model's mask is {shown(known)}")
    own, stops = config.ids("eos_token_id"), generation.ids("eos_token_id")
    more = [i for i in stops if i not in own and (not ids or i in ids.values())]
    if lost := sorted({*stops} - {*own, *more}):
        where = f"{generation.where} has eos_token_id={lost[0]}"
        warnings.warn(f"{where}, which is no control token of the tokenizer and ends no answer", stacklevel=3)
    return config.replace("eos_token_id", [*own, *more]) if more else config


def stop_ids(config: Fields, ids: Mapping[str, int], *texts: str) -> tuple[int, ...]:
    """config.json's eos_token_id (one or several), else the tokenizer's own, and those of the tokens `texts` that it has."""
    own = config.ids("eos_token_id") or ((ids[END_ROLE],) if END_ROLE in ids else ())
    return tuple(dict.fromkeys([*own, *(ids[t] for t in texts if t in ids)]))


def pad_id(config: Fields, stops: tuple[int, ...], default: int) -> int:
    """config.json's pad_token_id, else its first stop token, else `default`."""
    return (*config.ids("pad_token_id"), *stops, default)[0]
