#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GPQA (main set), 5-shot, by log-likelihood of the choices. They are three tokens long: their seven masked forms are
# fewer than MC_NUM, so the sum is exact. The data set is gated on the hub: accept its terms there and log in first.
#   bash eval_gpqa.sh --limit 10
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export WITHOUT_A_NETWORK="MODEL=tiny-llada TASK=gsm_symbolic_mc bash llada/eval_gpqa.sh --num_fewshot 0"
accelerate launch --quiet eval_llada.py --tasks "${TASK:-gpqa_main_n_shot}" --num_fewshot 5 --model llada_dist \
    --model_args "model_path=${MODEL:-GSAI-ML/LLaDA-8B-Base},mc_num=${MC_NUM:-128},is_check_greedy=False" \
    --output_path "results/${TASK:-gpqa_main_n_shot}/likelihood" --batch_size 8 "$@" || exit 2
