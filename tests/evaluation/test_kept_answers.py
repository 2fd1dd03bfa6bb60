# SPDX-License-Identifier: Apache-2.0
"""The store of answers: a run goes on where it stopped, and an answer is used again only for equal settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastdllm
from fastdllm.evaluation import answers
from tests.evaluation.asking import QUESTIONS, adapter, chat, generations

pytestmark = pytest.mark.usefixtures("loaded_once")


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, decoded: list[int], monkeypatch: Any) -> None:
    options = {"gen_length": 32, "save_dir": str(tmp_path), "batch_size": 1}
    asked = [(chat(adapter(), question), {"until": ["####"]}) for question in QUESTIONS[:4]]
    expected = adapter(1, gen_length=32).generate_until(generations(*asked), disable_tqdm=True)
    add = answers.AnswerStore.add
    with monkeypatch.context() as patch:

        def interrupted(self: answers.AnswerStore, *entry: Any) -> None:
            if len(self._known) == 2:
                raise KeyboardInterrupt
            add(self, *entry)

        patch.setattr(answers.AnswerStore, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapter(**options).generate_until(generations(*asked), disable_tqdm=True)
    (file,) = tmp_path.glob("*.jsonl")
    with file.open("a") as lines:
        lines.write('{"key": "abc", "ids": [1, 2')  # the process died while it wrote
    decoded.clear()
    again = adapter(**options)
    assert again.generate_until(generations(*asked), disable_tqdm=True) == expected
    assert decoded == [2] and again.reused == 2
    # The torn line is ignored and did not spoil the one after it.
    last = adapter(**options)
    assert last._answers.torn == 1
    assert last.generate_until(generations(*asked), disable_tqdm=True) == expected
    assert decoded == [2] and last.get_model_info()["speed"]["reused_answers"] == 4


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ({}, 0),
        ({"batch_size": 2}, 0),
        ({"threshold": 0.5}, 1),
        ({"gen_length": 24}, 1),
        ({"cache": "none"}, 1),
        ({"seed": 7}, 1),
    ],
)
def test_an_answer_is_used_again_only_for_equal_settings(
    change: dict, fresh: int, tmp_path: Path, decoded: list[int]
) -> None:
    options = {"gen_length": 16, "save_dir": str(tmp_path)}
    request = (chat(adapter(), QUESTIONS[0]), {})
    adapter(**options).generate_until(generations(request), disable_tqdm=True)
    decoded.clear()
    adapter(**{**options, **change}).generate_until(generations(request), disable_tqdm=True)
    assert len(decoded) == fresh
    changed = (chat(adapter(), QUESTIONS[1]), {})
    adapter(**options).generate_until(generations(changed), disable_tqdm=True)
    assert len(decoded) == fresh + 1, "another prompt is another answer"


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    model = fastdllm.load("tiny-llada")
    before = model.fingerprint()
    assert model.fingerprint() == before
    model.network.norm.data[0] += 1
    assert model.fingerprint() != before
    model.network.norm.data[0] -= 1


def test_the_fingerprint_covers_every_weight() -> None:
    model = fastdllm.load("tiny-llada")
    before = model.fingerprint()
    rows = model.network.embed.weight.data
    kept = rows.clone()
    for change in (lambda: rows[1:].copy_(kept[1:].flip(0)), lambda: rows[77, 101].add_(1e-3), lambda: rows[-1, -1].neg_()):
        change()
        assert model.fingerprint() != before
        rows.copy_(kept)
    assert model.fingerprint() == before
    model.banned[7] = True  # as with a tokenizer that lacks the token
    assert model.fingerprint() != before


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "a", "ids": [1e999]}',
        '{"key": "a", "ids": [1, [2]]}',
        '{"key": "a", "ids": "123"}',
        '{"key": "a", "ids": [-1]}',
        '{"key": "a", "ids": [100000]}',
        '{"key": "a", "ids": [1.0]}',
        '{"key": "a", "ids": [true]}',
        '{"key": 3, "ids": [1]}',
        '{"ids": [1]}',
        "null",
        "5",
        "[1]",
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_a_line_that_is_no_answer_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "answers_3.jsonl").write_text('{"key": "b", "ids": [1]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"answers_3\.jsonl:2 is no answer; a line has a key and ids"):
        answers.AnswerStore(tmp_path, 0, 2048)


def test_what_is_no_file_or_folder_is_named(tmp_path: Path) -> None:
    import os

    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "below"):
        with pytest.raises(ValueError, match="is no folder"):
            answers.AnswerStore(folder)
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / "answers_1.jsonl")
        with pytest.raises(ValueError, match=r"answers_1\.jsonl is no regular file"):
            answers.AnswerStore(tmp_path)
        (os.rmdir if make is os.mkdir else os.unlink)(tmp_path / "answers_1.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    store = answers.AnswerStore(tmp_path)
    store._path = Path("/dev/full")
    with pytest.raises(OSError, match=r"an answer could not be written .*No space left on device.*kept"):
        store.add("a", torch.tensor([1]), "x")
