# SPDX-License-Identifier: Apache-2.0
"""Chat with Fast-dLLM v2 in the terminal: python v2/run_chatbot.py, or python -m v2.run_chatbot."""

import sys

from fastdllm.shell import shell
from fastdllm.ui.terminal import main

if __name__ == "__main__":
    with shell("run_chatbot.py"):
        sys.exit(main(default_model="tiny-fast-dllm-v2"))
