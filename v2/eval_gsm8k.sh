#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GSM8K with Fast-dLLM v2 under the published settings: 0-shot, chat template, threshold 1, one prompt at a time.
#   bash eval_gsm8k.sh --limit 10
#   MODEL=tiny-fast-dllm-v2 TASK=gsm_symbolic_chat bash v2/eval_gsm8k.sh --limit 20        # no network
# MODEL: hub id, local folder or shipped checkpoint. TASK: another task of the kind. MODEL_ARGS: replaces the model
# arguments below. Further arguments go to lm-eval unchanged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export WITHOUT_A_NETWORK="MODEL=tiny-fast-dllm-v2 TASK=gsm_symbolic_chat bash v2/eval_gsm8k.sh"
MODEL=${MODEL:-Efficient-Large-Model/Fast_dLLM_v2_7B}
TASK=${TASK:-gsm8k}
# The published adapter rephrases the question of GSM8K; other tasks and models are asked as they were trained.
MODEL_ARGS=${MODEL_ARGS:-threshold=1,show_speed=True$([[ $TASK == gsm8k ]] && echo ,cot_prompt=True || true)}

accelerate launch --quiet eval.py --tasks "$TASK" --model fast_dllm_v2 --batch_size 1 --num_fewshot 0 \
    --model_args "model_path=$MODEL,$MODEL_ARGS" --confirm_run_unsafe_code \
    --apply_chat_template --fewshot_as_multiturn true --output_path "results/$TASK" "$@" || exit 2
