# SPDX-License-Identifier: Apache-2.0
"""Chat with Dream in the terminal: python dream/chat.py, or python -m dream.chat."""

import sys

from fastdllm.shell import shell
from fastdllm.ui.terminal import main

if __name__ == "__main__":
    with shell("chat.py"):
        sys.exit(main(default_model="tiny-dream"))
