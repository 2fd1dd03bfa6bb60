#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GSM8K, 5-shot, under the published settings. MODEL=, TASK=, SETTINGS= and more: settings.sh.
#   bash eval_gsm8k.sh --limit 100
#   MODEL=tiny-dream TASK=gsm_symbolic_chat bash eval_gsm8k.sh --num_fewshot 0 --apply_chat_template --limit 20
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source settings.sh

run_settings "${TASK:-gsm8k}" --num_fewshot 5 "$@"
