# SPDX-License-Identifier: Apache-2.0
"""Dream in the browser: python dream/app.py, then open the address it prints."""

import sys

from fastdllm.shell import shell
from fastdllm.ui.app import main

if __name__ == "__main__":
    with shell("app.py"):
        sys.exit(main(default_model="tiny-dream"))
