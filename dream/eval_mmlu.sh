#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# MMLU, 5-shot, by log-likelihood of the answer's letter: one exact forward a choice. Decoding options play no part.
#   bash eval_mmlu.sh --limit 10
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export WITHOUT_A_NETWORK="MODEL=tiny-dream TASK=gsm_symbolic_mc bash dream/eval_mmlu.sh --num_fewshot 0"
accelerate launch --quiet eval.py --tasks "${TASK:-mmlu}" --num_fewshot 5 --model dream \
    --model_args "pretrained=${MODEL:-Dream-org/Dream-v0-Base-7B},mc_num=1,is_check_greedy=False" \
    --output_path "results/${TASK:-mmlu}/likelihood" --batch_size 8 "$@" || exit 2
