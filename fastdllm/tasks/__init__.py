# SPDX-License-Identifier: Apache-2.0
"""lm-eval tasks that need no network: `lm_eval --include_path` takes `TASKS_DIR`."""

from pathlib import Path

TASKS_DIR = Path(__file__).parent
