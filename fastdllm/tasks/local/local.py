# SPDX-License-Identifier: Apache-2.0
"""Data and scores of the tasks that read local files; lm-eval loads this file by the path in their YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from fastdllm.scoring.problems import Problem
from fastdllm.scoring.samples import human_eval_problems, read_lines
from fastdllm.scoring.sandbox import run_program

FIELDS = ("question", "answer")


def gsm8k(data_file: str | None = None, fewshot_file: str | None = None, **metadata: Any) -> DatasetDict:
    """`metadata` holds whatever else lm-eval knows of the run."""
    if data_file is None:
        raise ValueError('gsm8k_local needs a file: --metadata \'{"data_file": "problems.jsonl"}\'')
    files = {"test": data_file, "train": fewshot_file}
    return DatasetDict({split: Dataset.from_list(_rows(file, *FIELDS)) for split, file in files.items() if file})


def humaneval(data_file: str | None = None, **metadata: Any) -> DatasetDict:
    """`metadata` holds whatever else lm-eval knows of the run."""
    rows = _rows(data_file or human_eval_problems(), "task_id", "prompt", "entry_point", "test")
    return DatasetDict(test=Dataset.from_list(rows))


def pass_at_1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    problem = Problem.read(doc["task_id"], doc)
    return {"pass@1": float(run_program(problem.solution(results[0]), checks=problem.checks()).passed)}


def _rows(file: str | Path, *fields: str) -> list[dict[str, Any]]:
    """Rows of a JSON list, or of JSON lines (.gz, too), cut to `fields`."""
    path = Path(file)
    rows = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else read_lines(path)
    cut = []
    for number, row in enumerate(rows, start=1):
        missing = [field for field in fields if field not in row]
        if missing:
            raise ValueError(f"{path}, row {number}: no {', '.join(missing)}; it has {', '.join(row)}")
        cut.append({field: row[field] for field in fields})
    if not cut:
        raise ValueError(f"{path} holds no rows")
    return cut
