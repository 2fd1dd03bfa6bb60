# SPDX-License-Identifier: Apache-2.0
"""The published call, python postprocess_code.py FILE; it needs --allow-code-execution, see `fastdllm score --help`."""

import sys

from fastdllm.shell import shell  # first: from here on an interruption is one line

# isort: split
from fastdllm.scoring.score import main

if __name__ == "__main__":
    with shell("postprocess_code.py"):
        sys.exit(main(prog="postprocess_code.py"))
