# SPDX-License-Identifier: Apache-2.0
"""What `load` is given: number formats, devices, names, and options of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastdllm
from tests.models.checkpoint_folder import load
from tests.published_checkpoints import (
    write_checkpoint,
    write_json,
)


@pytest.mark.parametrize(
    "name, dtype",
    [
        *(("bf16", torch.bfloat16), ("fp16", torch.float16), ("half", torch.float16), ("float64", torch.float64)),
        *(("torch.float32", torch.float32), ("auto", torch.bfloat16), (torch.float64, torch.float64)),
    ],
)
def test_spellings_of_a_number_format(tmp_path: Path, name: Any, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, "dream", torch_dtype="bfloat16")
    assert fastdllm.load(str(tmp_path), device="cpu", dtype=name).dtype == dtype


@pytest.mark.parametrize("dtype", ["float8", "int8", 16, torch.int64, ["bf16"]])
def test_a_wrong_number_format_is_named(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype=.* is unknown; allowed are auto, float32"):
        fastdllm.load("tiny-sudoku", device="cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta", "cuda:-3", 3.5, ["cpu"]])
def test_a_device_that_is_not_here_is_named(device: Any) -> None:
    with pytest.raises(ValueError, match=r"device=.* cannot be used here .*allowed are auto, cpu"):
        fastdllm.load("tiny-sudoku", device=device)


def test_auto_is_the_default_device() -> None:
    assert fastdllm.load("tiny-sudoku", device="auto").device == fastdllm.load("tiny-sudoku").device


@pytest.mark.parametrize(
    "option, hint", [("torch_dtype", "use dtype="), ("device_map", "use device="), ("treshold", "allowed are")]
)
def test_options_of_other_libraries_get_a_hint(option: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"load has no option '{option}'; {hint}"):
        fastdllm.load("tiny-sudoku", **{option: "x"})


@pytest.mark.parametrize("name", ["GSAI-ML/LLaDA-8B-Instruct", "checkpoints/llada-typo", "a b/c", "x/" + "y" * 200])
def test_a_model_that_cannot_be_fetched_is_one_line(name: str) -> None:
    """The tests run offline."""
    with pytest.raises(FileNotFoundError) as caught:
        fastdllm.load(name, device="cpu")
    message = str(caught.value)
    assert "\n" not in message and name in message and "tiny-llada" in message
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "name", ["", "nothing", "/no/such/folder", "a/b/c", "x\0y", "~/", 5, None, ["tiny-llada"], "z" * 5000]
)
def test_anything_else_is_no_model(name: Any) -> None:
    with pytest.raises((ValueError, OSError), match="model"):
        fastdllm.load(name, device="cpu")


def test_an_adapter_folder_is_not_a_model(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(FileNotFoundError, match="holds a LoRA adapter, not a model"):
        load(tmp_path)


def test_an_empty_name_is_not_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a variable of the shell that is not set."""
    write_checkpoint(tmp_path, "dream")
    write_json(tmp_path / "adapter_config.json", {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="model '' is neither a folder"):
        fastdllm.load("", device="cpu")
    with pytest.raises(FileNotFoundError, match="adapter='' is neither a folder"):
        fastdllm.load("tiny-sudoku", device="cpu", adapter="")
