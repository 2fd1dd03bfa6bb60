#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Pin every version that pyproject.toml allows today: rewrites requirements.txt, keeping the pins that still fit.
#   bash scripts/lock.sh [--upgrade] [options of uv pip compile]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export UV_CUSTOM_COMPILE_COMMAND="bash scripts/lock.sh"
uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --no-annotate \
    --no-emit-index-url --no-emit-find-links --output-file requirements.txt "$@"
