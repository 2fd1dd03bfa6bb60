#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up, then evaluate tiny-llada on GSM-Symbolic under several settings and show what each of them gains and costs.
#   bash scripts/quickstart.sh [--limit N] [--only NAME ...]
# Writes results/quickstart.json, .md and .png.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh studies

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m scripts.quickstart "$@"
