#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up, lint, check the format, test. Arguments go to pytest: bash scripts/test.sh tests/test_engine.py -k row
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

ruff check .
ruff format --check .
# Two workers with one thread each: small tensors gain nothing from more threads, and two cores stay busy.
OMP_NUM_THREADS=1 python -m pytest -q -m "not gpu" -n 2 "$@"
