# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2 in the browser: python v2/app.py, then open the address it prints."""

import sys

from fastdllm.shell import shell
from fastdllm.ui.app import main

if __name__ == "__main__":
    with shell("app.py"):
        sys.exit(main(default_model="tiny-fast-dllm-v2"))
