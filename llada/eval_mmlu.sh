#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# MMLU, 5-shot, by log-likelihood of the answer's letter: one exact forward a choice. Decoding options play no part.
#   bash eval_mmlu.sh --limit 10
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export WITHOUT_A_NETWORK="MODEL=tiny-llada TASK=gsm_symbolic_mc bash llada/eval_mmlu.sh --num_fewshot 0"
accelerate launch --quiet eval_llada.py --tasks "${TASK:-mmlu}" --num_fewshot 5 --model llada_dist \
    --model_args "model_path=${MODEL:-GSAI-ML/LLaDA-8B-Base},mc_num=1,is_check_greedy=False" \
    --output_path "results/${TASK:-mmlu}/likelihood" --batch_size 8 "$@" || exit 2
