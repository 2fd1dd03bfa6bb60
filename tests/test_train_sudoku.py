# SPDX-License-Identifier: Apache-2.0
"""tiny-sudoku: puzzles with one solution, none of them trained on; the script's own files; a model that solves them."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastdllm
from fastdllm.models import TINY
from fastdllm.tasks import TASKS_DIR
from scripts.recipes.tiny import tiny_formats, train_sudoku
from scripts.recipes.tiny.tiny_data import Problem

FOLDER = TINY / "tiny-sudoku"


def shipped(split: str) -> list[Problem]:
    lines = (TASKS_DIR / "mini_sudoku" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [(x["question"], x["answer"]) for x in map(json.loads, lines)]


def all_grids() -> list[str]:
    """Every filled 4x4 grid, by trying all permutations as rows."""
    found = []
    for rows in itertools.product(map("".join, itertools.permutations("1234")), repeat=4):
        columns = ["".join(column) for column in zip(*rows, strict=True)]
        boxes = [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
        if all(len(set(part)) == 4 for part in columns + boxes):
            found.append(" ".join(rows))
    return found


def test_every_puzzle_has_the_given_solution_and_no_other() -> None:
    grids = all_grids()
    assert len(grids) == 288
    problems = shipped("test") + shipped("validation")
    assert len({question for question, _ in problems}) == 1000
    for question, answer in problems:
        fitting = [g for g in grids if all(c in ("_", d) for c, d in zip(question, g, strict=True))]
        assert fitting == [answer] and 10 <= question.count("_") <= 12


def test_the_generator_still_gives_the_shipped_puzzles_and_training_leaves_them_out(monkeypatch) -> None:
    pytest.importorskip("reasoning_gym")
    drawn = train_sudoku.generate(train_sudoku.TEST_SEED, 0, 30)
    assert [p for p in drawn if p in shipped("test")] == drawn
    monkeypatch.setattr(train_sudoku, "TRAIN_SEED", train_sudoku.TEST_SEED - 20)
    kept = train_sudoku.training_problems(40, workers=1)
    assert kept == train_sudoku.generate(train_sudoku.TRAIN_SEED, 0, 20)


def test_shipped_files_are_what_the_script_writes(tmp_path: Path) -> None:
    train_sudoku.create(tmp_path / "new", TINY / "tiny-llada")
    for path in (tmp_path / "new").iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
    spec, _ = tiny_formats.read("llada", FOLDER)
    weights = load_file(FOLDER / "model.safetensors")
    assert {k: tuple(v.shape) for k, v in weights.items()} == tiny_formats.expected_shapes("llada", spec)
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 1_000_000


def test_only_answers_are_masked_and_weights_add_up_to_one() -> None:
    spec, tokenizer = tiny_formats.read("llada", FOLDER)
    documents, prompt = train_sudoku.encode(tokenizer, shipped("test"))
    assert (
        documents.shape == (500, prompt + 20) and tokenizer.decode(documents[0, prompt:].tolist()) == shipped("test")[0][1]
    )
    batch = train_sudoku.masked_batch(documents, prompt, spec.mask_id, torch.arange(500))
    masked = (batch.ids == spec.mask_id).view(500, -1)
    assert torch.equal(masked, (batch.weights > 0).view(500, -1)) and not masked[:, :prompt].any()
    assert 0.45 < masked[:, prompt:].float().mean() < 0.55
    assert batch.weights.sum().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(batch.targets[~masked.flatten()], batch.ids[~masked.flatten()])


def test_a_few_steps_write_a_checkpoint(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(train_sudoku, "training_problems", lambda count, workers: shipped("validation")[:count])
    arguments = ["train_sudoku", "--out", str(tmp_path / "new"), "--puzzles", "40", "--documents", "8", "--steps", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    train_sudoku.main()
    assert json.loads((tmp_path / "new" / "training.json").read_text(encoding="utf-8"))["steps"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    out = fastdllm.generate(fastdllm.load(str(tmp_path / "new"), device="cpu"), shipped("test")[0][0], gen_length=20)
    assert len(out.sequences[0]) == 39  # 19 tokens of the prompt, without a template around them


def test_confidence_finds_an_order_that_solves_what_chance_does_not() -> None:
    model = fastdllm.load("tiny-sudoku", device="cpu")
    problems = shipped("test")[:100]
    asked = [[{"role": "user", "content": question}] for question, _ in problems]
    options = {"gen_length": 20, "block_length": 20, "cache": "none"}

    def solved(**more: str | float) -> int:
        texts = fastdllm.generate(model, asked, **options, **more).texts
        return sum(text == answer for text, (_, answer) in zip(texts, problems, strict=True))

    one = solved(decoder="quota")
    assert one >= 85
    assert solved(decoder="quota", confidence="random") < one - 10
    assert solved(threshold=0.5) < one - 10
