#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Score generated programs offline: python scripts/score_code.py samples_humaneval.jsonl --allow-code-execution"""

import sys

from fastdllm.scoring.score import main, pass_at_k, score_file

__all__ = ["main", "pass_at_k", "score_file"]

if __name__ == "__main__":
    sys.exit(main())
