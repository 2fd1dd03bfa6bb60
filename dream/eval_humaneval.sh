#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# HumanEval, 0-shot, under the published settings: lm-eval writes the samples, postprocess_code.py scores them.
# Scoring runs code that the model wrote, confined (fastdllm/scoring), and only with ALLOW_CODE_EXECUTION=1.
#   ALLOW_CODE_EXECUTION=1 bash eval_humaneval.sh --limit 20
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source settings.sh

# lm-eval's task file refuses to load without this. --predict_only keeps lm-eval from running the samples itself.
export HF_ALLOW_CODE_EVAL=1
started=$(mktemp)
trap 'rm -f "$started"' EXIT
run_settings "${TASK:-humaneval}" --predict_only "$@"

while IFS= read -r -d "" samples; do
    if [[ ${ALLOW_CODE_EXECUTION:-0} == 1 ]]; then
        python postprocess_code.py "$samples" --allow-code-execution
    else
        echo "to score: python postprocess_code.py $PWD/$samples --allow-code-execution"
    fi
done < <(find "results/${TASK:-humaneval}" -name "samples_*.jsonl" -newer "$started" -print0)
