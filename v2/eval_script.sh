#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The published evaluations of Fast-dLLM v2, one after the other: MMLU, GPQA, GSM8K, MATH, IFEval.
#   bash eval_script.sh --limit 20                 bash eval_script.sh              (all of it: hours on one GPU)
#   TASKS="gsm8k ifeval" bash eval_script.sh       some of: mmlu gpqa_main_n_shot gsm8k minerva_math ifeval
# MODEL=, SETTINGS=, THRESHOLD=, MODEL_ARGS=: settings.sh. Further arguments go to lm-eval unchanged; a task that needs an
# extra of lm-eval says so (minerva_math: lm_eval[math], ifeval: lm_eval[ifeval]; GPQA's data needs its terms accepted).
#
# MMLU and GPQA are scored by log-likelihood with likelihood=first_token, the measure of the published numbers; leave
# it out for the probability of the whole answer. The others are generated with threshold 1, one token a step; 0.9 is
# the published fast setting: THRESHOLD=0.9.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source settings.sh

for task in ${TASKS:-mmlu gpqa_main_n_shot gsm8k minerva_math ifeval}; do
    case $task in
        mmlu) evaluate mmlu first_token 1 likelihood=first_token --num_fewshot 5 "$@" ;;
        gpqa_main_n_shot) evaluate gpqa_main_n_shot first_token 1 likelihood=first_token "$@" ;;
        gsm8k | minerva_math) run_settings "$task" 32 show_speed=True,cot_prompt=True --num_fewshot 0 "$@" ;;
        ifeval) run_settings ifeval 32 show_speed=True "$@" ;;
        *)
            echo "TASKS: '$task' is none of mmlu gpqa_main_n_shot gsm8k minerva_math ifeval" >&2
            exit 2
            ;;
    esac
done
