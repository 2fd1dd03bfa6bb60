# SPDX-License-Identifier: Apache-2.0
"""`--adapter` on every command line that chooses a model: it reaches the weights, and one that does not fit is one line."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import fastdllm
from fastdllm import cli
from fastdllm.models.hub import TINY
from scripts.studies import pareto
from tests.published_checkpoints import write_adapter

BASE = "tiny-sudoku"
MODULE = "model.transformer.blocks.0.q_proj"
Run = Callable[[str], int]


def adapter(folder: Path, module: str = MODULE) -> str:
    with safe_open(TINY / BASE / "model.safetensors", "pt") as file:
        shape = tuple(file.get_slice(f"{MODULE}.weight").get_shape())
    write_adapter(folder, {f"{module}.weight": shape}, [module])
    return str(folder)


@pytest.fixture(params=["chat", "app", "serve", "batch", "eval", "eval, peft", "eval, lora_path", "pareto"])
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run one of the commands with an adapter; gives its exit code."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    asked = tmp_path / "in.jsonl"
    body = {"model": BASE, "prompt": "___3 __4_ 21__ 4___", "max_tokens": 4}
    asked.write_text(json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}))
    name = request.param.partition(", ")[2] or "adapter"

    def run(path: str) -> int:
        own = ["--adapter", path, "--device", "cpu"]
        if request.param == "pareto":
            monkeypatch.setattr(pareto, "RESULTS", tmp_path)
            monkeypatch.setattr(sys, "argv", ["pareto", "run", "--task", "sudoku", "--limit", "1", *own])
            monkeypatch.setattr(pareto, "settings_of", lambda *_: ["threshold=0.9+none"])
            pareto.loaded.cache_clear()
            try:
                pareto.main()
            except SystemExit as stopped:
                return int(stopped.code or 0)
            return 0
        if request.param in ("app", "serve"):
            monkeypatch.setattr("fastdllm.serving.command.run", lambda *_: 0)
        arguments = {
            "chat": ["chat", "--model", BASE, *own],
            "app": ["app", "--model", BASE, "--gen-length", "16", *own],
            "serve": ["serve", BASE, "--gen-length", "16", *own],
            "batch": ["batch", str(asked), str(tmp_path / "out.jsonl"), "--model", BASE, "--gen-length", "16", *own],
        }
        model_args = f"pretrained={BASE},{name}={path},gen_length=8,block_length=8"
        options = ["--tasks", "gsm_symbolic", "--limit", "1", "--device", "cpu", "--model_args", model_args]
        return cli.main(arguments.get(request.param, ["eval", *options]))

    return run


def test_the_adapter_is_in_the_weights(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, loaded = adapter(tmp_path / "2026"), list[fastdllm.Model]()
    load = fastdllm.load
    expected = load(BASE, device="cpu", adapter=path)
    assert expected.fingerprint() != load(BASE, device="cpu").fingerprint()

    def recording(*given: Any, **options: Any) -> fastdllm.Model:
        loaded.append(load(*given, **options))
        return loaded[-1]

    monkeypatch.setattr(fastdllm, "load", recording)
    assert command(path) == 0
    assert [model.fingerprint() for model in loaded] == [expected.fingerprint()]


@pytest.mark.parametrize("fault", ["another model's", "missing"])
def test_an_adapter_that_does_not_fit_is_one_line(
    command: Run, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    module = "model.layers.0.self_attn.q_proj"
    path = adapter(tmp_path / "other", module) if fault != "missing" else str(tmp_path / "nothing")
    assert command(path) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert path in last and (module in last or fault == "missing")


def test_a_model_chosen_later_in_the_chat_has_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It is another network, which the adapter does not fit; the first one gets it again."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"/model tiny-dream\n/model {BASE}\n".encode())))
    assert cli.main(["chat", "--model", BASE, "--adapter", adapter(tmp_path / "lora"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "could not load" not in out and out.count("loading") == 3
