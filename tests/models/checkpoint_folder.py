# SPDX-License-Identifier: Apache-2.0
"""Folders of checkpoints that a test writes, changes and loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastdllm
from tests.published_checkpoints import (
    write_json,
)

KINDS = ["llada", "dream", "v2"]


def load(folder: Path) -> fastdllm.Model:
    return fastdllm.load(str(folder), device="cpu")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)
