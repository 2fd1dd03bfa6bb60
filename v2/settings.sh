# SPDX-License-Identifier: Apache-2.0
# Sourced by eval_gsm8k.sh and eval_script.sh: runs a task under one setting after the other.
#
#   MODEL=...        hub id, local folder or a shipped checkpoint (tiny-fast-dllm-v2)
#   SETTINGS="..."   some of: baseline parallel parallel_sub_block; default baseline, the setting of the published numbers
#   THRESHOLD=...    of the parallel settings, default 0.9, the published fast one; given without SETTINGS it means parallel
#   MODEL_ARGS=...   replaces the model arguments of a setting; this run is called custom
#
# Results go to results/<task>/<setting>/ next to this file. Arguments go to lm-eval unchanged.

export WITHOUT_A_NETWORK="MODEL=tiny-fast-dllm-v2 TASK=gsm_symbolic_chat bash v2/eval_gsm8k.sh"
MODEL=${MODEL:-Efficient-Large-Model/Fast_dLLM_v2_7B}
if [[ -n ${MODEL_ARGS:-} ]]; then
    if [[ -n ${SETTINGS:-} ]]; then
        echo "SETTINGS='$SETTINGS' names model arguments, which MODEL_ARGS replaces; give one of them" >&2
        exit 2
    fi
    SETTINGS=custom
elif [[ ${THRESHOLD:-1} != 1 ]]; then
    SETTINGS=${SETTINGS:-parallel}
fi
SETTINGS=${SETTINGS:-baseline}
THRESHOLD=${THRESHOLD:-0.9}

# setting_args SETTING MORE: the model arguments of a setting, by their published names, with those that the task adds.
setting_args() {
    case $1 in
        baseline) echo "threshold=1,$2" ;;
        parallel) echo "threshold=$THRESHOLD,$2" ;;
        parallel_sub_block) echo "threshold=$THRESHOLD,use_block_cache=True,$2" ;;
        custom) echo "$MODEL_ARGS" ;;
        *)
            echo "SETTINGS: '$1' is none of baseline parallel parallel_sub_block" >&2
            return 2
            ;;
    esac
}

# evaluate TASK SETTING BATCH_SIZE MODEL_ARGS [argument of lm-eval ...]
evaluate() {
    local task=$1 setting=$2 batch_size=$3 args=$4
    shift 4
    echo "== $task, $setting: $args" >&2
    accelerate launch --quiet eval.py --tasks "$task" --model fast_dllm_v2 --batch_size "$batch_size" \
        --model_args "model_path=$MODEL,$args" --confirm_run_unsafe_code \
        --apply_chat_template --fewshot_as_multiturn true --output_path "results/$task/$setting" "$@" || exit 2
}

# run_settings TASK BATCH_SIZE MORE [argument of lm-eval ...]: every setting, with the model arguments MORE added to each.
run_settings() {
    local task=$1 batch_size=$2 more=$3 setting args
    shift 3
    for setting in $SETTINGS; do
        args=$(setting_args "$setting" "$more")
        evaluate "$task" "$setting" "$batch_size" "$args" "$@"
    done
}

for setting in $SETTINGS; do setting_args "$setting" "" >/dev/null || exit 2; done
