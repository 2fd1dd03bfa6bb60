#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GSM8K with Fast-dLLM v2 under the published settings: 0-shot, chat template, threshold 1, one prompt at a time.
# MODEL=, SETTINGS=, THRESHOLD=, MODEL_ARGS=: settings.sh. TASK: another task of the kind.
#   bash eval_gsm8k.sh --limit 10
#   MODEL=tiny-fast-dllm-v2 TASK=gsm_symbolic_chat bash v2/eval_gsm8k.sh --limit 20        # no network
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source settings.sh

TASK=${TASK:-gsm8k}
# The published adapter rephrases the question of GSM8K; other tasks and models are asked as they were trained.
run_settings "$TASK" 1 "show_speed=True$([[ $TASK == gsm8k ]] && echo ,cot_prompt=True || true)" --num_fewshot 0 "$@"
