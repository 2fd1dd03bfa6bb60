# SPDX-License-Identifier: Apache-2.0
"""The loading benchmark at a tiny size: it writes what the loader reads, notices wrong weights and reports every figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdllm.models.llada import FAMILY
from scripts.benchmarks import loading


def test_the_published_size_is_the_published_configuration() -> None:
    shape = loading.LLADA_8B
    config = loading.small_config(shape["n_layers"], shape["d_model"], shape["vocab_size"])
    assert FAMILY.spec(config, {}) == FAMILY.spec(shape, {})


def test_wrong_weights_are_noticed(tmp_path: Path) -> None:
    checked = loading.write_checkpoint(tmp_path, loading.small_config(2, 128, 1024), 3)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) == len(checked) == 3
    assert [where[name] for name in checked] == sorted(set(where.values()))
    assert loading.load(str(tmp_path), torch.device("cpu"), checked)["seconds"] > 0
    path = tmp_path / where[checked[1]]
    tensors = load_file(path)
    tensors[checked[1]].view(-1)[-1] += 1
    save_file(tensors, path)
    with pytest.raises(SystemExit, match=f"{checked[1]} differs from what was written"):
        loading.load(str(tmp_path), torch.device("cpu"), checked)


@pytest.mark.slow
def test_a_run_prints_its_figures_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--layers", "1", "--width", "128", "--vocab", "1024", "--shards", "2"]
    loading.main([*options, "--folder", str(tmp_path)])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    parameters = 2 * 1024 * 128 + 128 * (4 * 128 + 3 * 384) + 3 * 128
    assert report["bytes"] == 2 * parameters
    assert report["floors"]["read_gb_s"] > 0
    assert report["cached"]["gb_s"] > 0 and report["dropped"]["gb_s"] > 0
    assert not list(tmp_path.iterdir())
