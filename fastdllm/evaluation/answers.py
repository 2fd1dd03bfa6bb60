# SPDX-License-Identifier: Apache-2.0
"""Answers to many prompts, each kept on disk as soon as it is finished, so that an interrupted evaluation can go on.

An answer is found by a hash of everything that determined it (prompt ids, every setting, the model's own weights), never
by its place in a list: after any change it is generated anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdllm.build import assemble, runner
from fastdllm.config import DecodeConfig
from fastdllm.engine import Request, decode
from fastdllm.generation import answer_length
from fastdllm.models import Model
from fastdllm.stats import Stats, peak_memory
from fastdllm.text import is_cut


@dataclass(frozen=True)
class Query:
    """One answer that is wanted: prompt ids, the strings that end it, the settings, and the key that names it on disk."""

    prompt: list[int]
    until: tuple[str, ...]
    config: DecodeConfig
    key: str


def answer(model: Model, queries: list[Query], batch_size: int, stats: Stats) -> Iterator[tuple[int, Tensor]]:
    """(index, ids [N] on the CPU) of queries with equal settings, each as soon as it is finished: up to the stop token, or
    to the end of the block in which a stop string appeared.

    What it cost is added to `stats`. Each query draws from a seed of its own, made from its key.
    """
    config = queries[0].config.replace(batch_size=batch_size)
    run = assemble(model, config)

    def request(query: Query) -> Request:
        seed = (config.seed + int(query.key[:12], 16)) % 2**63
        stops = tuple(filter(None, query.until))
        ends = (lambda ids: is_cut(model.tokenizer.decode(ids, skip_special_tokens=True), stops)) if stops else None
        return Request(torch.tensor(query.prompt), config.gen_length, seed, ends=ends)

    requests = [request(query) for query in queries]
    for step in decode(model, requests, run, runner(model, config), rows=batch_size):
        stats.take(step)
        for at, result in step.done.items():
            ids = result.ids[len(queries[at].prompt) :].cpu()  # sync: a finished answer
            length = answer_length(ids, run.stop_ids, model.spec.mask_id)
            stats.finish(result, length)
            yield at, ids[:length]
    stats.add(Stats(peak_memory=peak_memory(model.device)))


def answer_key(*parts: Any) -> str:
    """A hash of JSON-like values, the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class AnswerStore:
    """Key -> token ids of an answer, over all files of a folder; this process appends to its own.

    A line is written in one call and flushed, so a process that dies leaves at most one torn line, at the end; torn lines
    are ignored and counted in `torn`. ValueError, naming file and line, for lines that are something else than answers, and
    for a folder or file that is none. vocab: ids lie below it.
    """

    def __init__(self, folder: str | Path, rank: int = 0, vocab: int = 2**31) -> None:
        self._known: dict[str, list[int]] = {}
        self.torn, self._vocab = 0, vocab
        folder = Path(folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"save_dir={str(folder)!r} is no folder") from None
        self._path = folder / f"answers_{rank}.jsonl"
        for path in sorted({self._path, *folder.glob("answers_*.jsonl")}):
            if path.exists() and not path.is_file():
                raise ValueError(f"{path} is no regular file; answers are kept there")
            if path.exists():
                self._read(path)

    def _read(self, path: Path) -> None:
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                self.torn += 1
                continue
            except RecursionError:
                entry = None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            valid = isinstance(ids, list) and all(type(token) is int and 0 <= token < self._vocab for token in ids)
            if not valid or not isinstance(entry.get("key"), str):
                raise ValueError(
                    f"{path}:{number} is no answer; a line has a key and ids, which are integers below {self._vocab}"
                )
            self._known[entry["key"]] = ids

    def get(self, key: str) -> Tensor | None:
        """The answer's ids [N], None where it is not known."""
        ids = self._known.get(key)
        return None if ids is None else torch.tensor(ids, dtype=torch.long)

    def add(self, key: str, ids: Tensor, text: str) -> None:
        """Keep an answer; `text` is for human readers of the file."""
        self._known[key] = ids.tolist()
        line = json.dumps({"key": key, "ids": self._known[key], "text": text}, ensure_ascii=False) + "\n"
        try:
            with self._path.open("ab") as file:
                # After a torn line the next one starts on a line of its own.
                start = b"\n" if file.tell() and not self._ends_with_newline() else b""
                file.write(start + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            kept = "the answers before it are kept, and the same command goes on from them"
            raise OSError(f"{self._path}: an answer could not be written ({error.strerror}); {kept}") from error

    def _ends_with_newline(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
