# SPDX-License-Identifier: Apache-2.0
"""Programs of a checkout, each run with `python -m`."""

import fastdllm.shell  # noqa: F401 - before what takes seconds to import: from here on an interruption is one line
