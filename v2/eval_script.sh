#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The published evaluations of Fast-dLLM v2, one after the other: MMLU, GPQA, GSM8K, MATH, IFEval.
#   bash eval_script.sh --limit 20                 bash eval_script.sh              (all of it: hours on one GPU)
#   TASKS="gsm8k ifeval" bash eval_script.sh       some of: mmlu gpqa_main_n_shot gsm8k minerva_math ifeval
# MODEL: hub id, local folder or shipped checkpoint. Further arguments go to lm-eval unchanged; a task that needs an extra
# of lm-eval says so (minerva_math: lm_eval[math], ifeval: lm_eval[ifeval]; GPQA's data needs its terms accepted).
#
# MMLU and GPQA are scored by log-likelihood with likelihood=first_token, the measure of the published numbers; leave
# it out for the probability of the whole answer. The others are generated with threshold 1, one token a step; 0.9 is
# the published fast setting: THRESHOLD=0.9.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export WITHOUT_A_NETWORK="MODEL=tiny-fast-dllm-v2 TASK=gsm_symbolic_chat bash v2/eval_gsm8k.sh"
MODEL=${MODEL:-Efficient-Large-Model/Fast_dLLM_v2_7B}
THRESHOLD=${THRESHOLD:-1}

# evaluate TASK BATCH_SIZE MODEL_ARGS [argument of lm-eval ...]
evaluate() {
    local task=$1 batch_size=$2 model_args=$3
    shift 3
    echo "== $task: $model_args" >&2
    accelerate launch --quiet eval.py --tasks "$task" --model fast_dllm_v2 --batch_size "$batch_size" \
        --model_args "model_path=$MODEL,$model_args" --confirm_run_unsafe_code \
        --apply_chat_template --fewshot_as_multiturn true --output_path "results/$task" "$@" || exit 2
}

generate="threshold=$THRESHOLD,show_speed=True"
for task in ${TASKS:-mmlu gpqa_main_n_shot gsm8k minerva_math ifeval}; do
    case $task in
        mmlu) evaluate mmlu 1 likelihood=first_token --num_fewshot 5 "$@" ;;
        gpqa_main_n_shot) evaluate gpqa_main_n_shot 1 likelihood=first_token "$@" ;;
        gsm8k | minerva_math) evaluate "$task" 32 "$generate,cot_prompt=True" --num_fewshot 0 "$@" ;;
        ifeval) evaluate ifeval 32 "$generate" "$@" ;;
        *)
            echo "TASKS: '$task' is none of mmlu gpqa_main_n_shot gsm8k minerva_math ifeval" >&2
            exit 2
            ;;
    esac
done
