# SPDX-License-Identifier: Apache-2.0
"""The data next to this file, found from any working directory; lm-eval loads this module by its YAML's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from fastdllm.scoring.samples import read_lines

FOLDER = Path(__file__).parent


def load(**metadata: Any) -> DatasetDict:
    """Every file of the folder as a split of its name. `metadata` is what lm-eval knows of the run."""
    return DatasetDict({path.stem: Dataset.from_list(list(read_lines(path))) for path in FOLDER.glob("*.jsonl")})
