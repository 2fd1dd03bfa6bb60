# SPDX-License-Identifier: Apache-2.0
"""Keys and values of blocks that prompts begin with, for later prompts that begin alike.

In a block-causal model the keys and values of a finished block depend on the tokens up to the block's end and on nothing
else, so a prompt that begins like an earlier one need not compute them again. Blocks form a tree, and need not be of one
length: a block is found by its token ids below the block before it, so two prompts meet only where all their tokens are
equal. Rows copy what they take, and so a block may be dropped at any time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from fastdllm.fields import is_integer, shown
from fastdllm.store import KVStore

if TYPE_CHECKING:
    from fastdllm.models import Model

POSITIONS = 32768  # kept unless the caller says otherwise
ID_BYTES = 8  # of a token id
Tree = dict[bytes, "Node"]  # blocks that follow one another, by their token ids


@dataclass(eq=False)
class Node:
    """A block.

    kv: [2, L, K, N, D], keys and values of its N positions.
    below: the blocks that follow it, by token ids.
    """

    above: Tree
    ids: bytes
    kv: Tensor
    below: Tree = field(default_factory=dict)

    def __len__(self) -> int:
        return self.kv.shape[3]


class PromptCache:
    """What prompts that begin alike share. A run has its own; one that is given as `prompt_cache=` outlives the run, so that
    the turns of a conversation and later calls find what earlier ones computed.

    positions: kept at most; those that were not used for the longest time go first.

    It belongs to one model and block length at a time: with another one, or with other weights, it starts empty. torch does
    not tell of weights that change through `.data`, or of tensors of the inference mode that change: `clear` it then.

    Runs on several threads may share it, as long as they use one stream of the device. Raises ValueError for positions below
    1.
    """

    def __init__(self, positions: int = POSITIONS) -> None:
        if not is_integer(positions) or positions < 1:
            raise ValueError(f"positions={shown(positions)} must be an integer of at least 1")
        self.positions = int(positions)
        self._lock = threading.RLock()
        self._owner: Any = None
        self.clear()

    def __repr__(self) -> str:
        return f"PromptCache(positions={self.positions})"

    @property
    def kept(self) -> int:
        """Positions that are kept now."""
        return self._kept

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._kept = 0
            self._tree: Tree = {}
            # A block was used no earlier than those that follow it, so the first one here is a leaf of the tree.
            self._recent: OrderedDict[Node, None] = OrderedDict()

    def open(self, model: Model, block: int) -> Tree:
        """Before a run of `model` whose queries see blocks of so many positions (0: no further than themselves): drop what
        another model, length or weights left.

        The other methods take what this one returns. When another run has dropped that meanwhile, they do nothing.
        """
        weights = chain(model.network.parameters(), model.network.buffers())
        owner = ref(model), block, tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
        with self._lock:
            if owner != self._owner:
                self.clear()
                self._owner = owner
            return self._tree

    def count(self, tree: Tree, blocks: Sequence[bytes]) -> int:
        """How many positions are kept of the blocks that a prompt begins with. blocks: their token ids, int64."""
        with self._lock:
            return sum(map(len, self._path(tree, blocks)))

    def load(self, tree: Tree, blocks: Sequence[bytes], store: KVStore, rows: Iterable[int]) -> int:
        """Copy those that are kept into `rows` of the store, from position 0; returns how many positions."""
        with self._lock:
            path = self._path(tree, blocks)
            self._touch(path)
        if not path:
            return 0
        kv = torch.cat([node.kv for node in path], 3)  # [2, L, K, P, D]
        for row in rows:
            for of_store, kept in ((store.k, kv[0]), (store.v, kv[1])):
                of_store[:, row, :, : kv.shape[3]] = kept
        return kv.shape[3]

    def keep(self, tree: Tree, blocks: Sequence[bytes], store: KVStore, row: int) -> None:
        """Keep copies of the blocks at the beginning of a row of the store, as far as there is room.

        None where something in them is not a number: it may come from the prompt's end, and would reach prompts that begin
        alike.
        """
        with self._lock:
            path = self._path(tree, blocks)
            start = sum(map(len, path))
            new = slice(start, start + sum(map(len, blocks[len(path) :])) // ID_BYTES)
            if tree is not self._tree or new.stop == new.start:
                return
            if not finite(store.k[:, row, :, new], store.v[:, row, :, new]):
                return
            for ids in blocks[len(path) :]:
                stop = start + len(ids) // ID_BYTES
                if not self._make_room(stop - start, path):
                    break
                above = path[-1].below if path else tree
                try:
                    kv = torch.stack((store.k[:, row, :, start:stop], store.v[:, row, :, start:stop]))
                except torch.OutOfMemoryError:
                    break
                node = above[ids] = Node(above, ids, kv)
                self._recent[node] = None
                self._kept += len(node)
                path.append(node)
                start = stop
            self._touch(path)

    def _path(self, tree: Tree, blocks: Sequence[bytes]) -> list[Node]:
        path: list[Node] = []
        level = tree if tree is self._tree else {}
        for ids in blocks:
            if ids not in level:
                break
            path.append(level[ids])
            level = path[-1].below
        return path

    def _touch(self, path: list[Node]) -> None:
        for node in reversed(path):
            self._recent.move_to_end(node)

    def _make_room(self, positions: int, held: list[Node]) -> bool:
        """Drop blocks until so many positions fit; False where only those of the prompt at hand are left."""
        while self._kept + positions > self.positions:
            oldest = next(iter(self._recent), None)
            if oldest is None or oldest in held:
                return False
            del self._recent[oldest], oldest.above[oldest.ids]
            self._kept -= len(oldest)
        return True


def finite(*tensors: Tensor) -> bool:
    total = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors])
    return bool(total.isfinite().all())  # sync: once a prompt, whose round has been read already
