# SPDX-License-Identifier: Apache-2.0
"""What an evaluation was asked for, checked before lm-eval begins: it tells a mistake late or not at all."""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import sqlite3
import tempfile
import types
import typing
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastdllm.evaluation.distributed import choose_device
from fastdllm.evaluation.options import parse_arguments, read_batch_size
from fastdllm.fields import coerce, shown

SEEDS = {"random": (-math.inf, math.inf), "numpy": (0, 2**32 - 1), "torch": (-(2**63), 2**64 - 1)}  # in lm-eval's order
OF_SEVERAL_TYPES = ("batch_size", "include_path", "limit", "max_batch_size", "num_fewshot", "seed")  # `check` reads them


def check(options: Mapping[str, Any], own: bool) -> None:
    """ValueError for a value that lm-eval would misread, or refuse only after it has begun.

    options: lm-eval's, by their names, those of a config file among them; None where one is left open.
    own: whether the model is one of this project's, which have devices and batch sizes of their own.
    """
    given = {name: value for name, value in options.items() if value is not None}
    _check_types(given)
    if not given.get("tasks", True):
        raise ValueError(f"tasks={given['tasks']!r} names no task")
    _check_texts("tasks", given.get("tasks", []))
    _check_hub(given.get("hf_hub_log_args"))
    for name in ("wandb_args", "trackio_args"):
        library = name.removesuffix("_args")
        if given.get(name) and not find_spec(library):
            raise ValueError(f"{name}={shown(given[name])} needs a library that is not installed: pip install {library}")
    check_folders(given.get("include_path"))
    _check_limit(given.get("limit"))
    for name, least in (("num_fewshot", 0), ("max_batch_size", 1)):
        if name in given and coerce(name, given[name], int) < least:
            raise ValueError(f"{name}={given[name]} must be at least {least}")
    _check_seeds(given.get("seed"))
    if "samples" in given:
        read_samples(given["samples"])
    if not isinstance(logging.getLevelName(level := given.get("verbosity", "INFO").upper()), int):
        raise ValueError(f"verbosity={level!r} is unknown; allowed are DEBUG, INFO, WARNING, ERROR, CRITICAL")
    if own:
        read_batch_size(given.get("batch_size"))
        if "device" in given:
            choose_device(given["device"])
    _check_output(given.get("output_path"))
    _check_answers(given.get("use_cache"))


def _check_texts(name: str, value: Any) -> None:
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
        raise ValueError(f"{name}={shown(value)} must be a text or a list of texts")


def check_folders(given: str | list[str] | None) -> None:
    """ValueError for folders of tasks that do not exist: lm-eval finds nothing there, and goes on."""
    _check_texts("include_path", given or [])
    for folder in [given] if isinstance(given, str) else given or ():
        if not Path(folder).is_dir():
            raise ValueError(f"include_path={shown(folder)}: no such folder")


def _check_types(given: Mapping[str, Any]) -> None:
    """ValueError for a value of another type than lm-eval declares, which only a config file can have."""
    from lm_eval.config.evaluate_config import DICT_KEYS, EvaluatorConfig

    for name, hint in typing.get_type_hints(EvaluatorConfig).items():
        if name not in given or name in OF_SEVERAL_TYPES:
            continue
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = {typing.get_origin(kind) or kind for kind in members} - {type(None)}
        kinds |= {str} if name in DICT_KEYS else set()  # name=value,name=value
        if type(given[name]) not in kinds:
            words = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"{name}={shown(given[name])} must be of type {words}")


def _check_hub(arguments: str | dict[str, Any] | None) -> None:
    """ValueError for arguments that lm-eval's tracker of results does not have."""
    from lm_eval.loggers import EvaluationTracker

    known = inspect.signature(EvaluationTracker).parameters
    for name, value in parse_arguments(arguments or {}, "hf_hub_log_args").items():
        if name not in known:
            raise ValueError(f"hf_hub_log_args: unknown {name}={shown(value)}; known are {', '.join(known)}")


def _check_limit(limit: Any) -> None:
    if limit is None:
        return
    number = coerce("limit", limit, float)
    if isinstance(limit, str) or number <= 0 or (number > 1 and not number.is_integer()):
        raise ValueError(f"limit={shown(limit)} must be a whole number of questions, or a share of them between 0 and 1")


def _check_seeds(seed: Any) -> None:
    """lm-eval itself says what is wrong with other lists of seeds, at once."""
    seeds = seed if isinstance(seed, list) else [seed] * len(SEEDS)
    for (name, (least, most)), value in zip(SEEDS.items(), seeds, strict=False):
        if value is not None and not least <= coerce("seed", value, int) <= most:
            raise ValueError(f"seed={value} of {name} must lie between {least} and {most}")


def read_samples(samples: Any) -> Any:
    """The questions that `samples` chooses, by their tasks' names, from JSON or from a file of it. ValueError for others."""
    if isinstance(samples, str):
        try:
            samples = json.loads(samples if samples.lstrip().startswith("{") else Path(samples).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"samples={shown(samples)} is no JSON object and no file with one: {error}") from error
    rows = samples.values() if isinstance(samples, dict) else [samples]
    if not all(row and isinstance(row, list) and all(type(i) is int and i >= 0 for i in row) for row in rows):
        raise ValueError(f"samples={shown(samples)} must give each task's name a list of question numbers from 0")
    return samples


def _check_output(path: str | None) -> None:
    """ValueError where results cannot be written: lm-eval would say so in a log line, after everything is computed."""
    if path is not None:
        _check_writable("output_path", path, Path(path).parent if path.endswith(".json") else Path(path))


def _check_answers(path: str | None) -> None:
    """ValueError where answers cannot be kept: the thread that writes them would say so in a traceback."""
    if path is None:
        return
    file = Path(f"{path}_rank{os.environ.get('LOCAL_RANK', '0')}.db")  # as lm-eval calls it
    _check_writable("use_cache", path, file.parent)
    if not file.exists():
        return
    try:
        database = sqlite3.connect(file, isolation_level=None)
        try:
            database.execute("BEGIN IMMEDIATE")  # reads the file's head, and takes the right to write
        finally:
            database.close()
    except sqlite3.Error as error:
        raise ValueError(f"use_cache={path!r}: {file} is no database that can be written to: {error}") from error


def _check_writable(option: str, path: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(4096))  # a full disk takes a name, but nothing in it
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # a name with a null byte
        raise ValueError(f"{option}={path!r} is no folder that can be written to: {reason}") from error
