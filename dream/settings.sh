# SPDX-License-Identifier: Apache-2.0
# Sourced by eval_gsm8k.sh and eval_humaneval.sh: runs a task under the published settings, one after the other.
#
#   MODEL=...       hub id, local folder or a shipped checkpoint (tiny-dream)
#   TASK=...        another task of the same kind, for instance one that needs no network
#   SETTINGS="..."  some of: baseline prefix parallel prefix_parallel dual_parallel
#   MAX_NEW_TOKENS, THRESHOLD, BLOCK_LENGTH (unset: as published, 32 with a cache, the whole answer without)
#
# Results and samples go to results/<task>/<setting>/ next to this file. Arguments go to lm-eval unchanged.

export WITHOUT_A_NETWORK="MODEL=tiny-dream TASK=gsm_symbolic_chat bash dream/eval_gsm8k.sh --num_fewshot 0 --apply_chat_template"
MODEL=${MODEL:-Dream-org/Dream-v0-Base-7B}
SETTINGS=${SETTINGS:-baseline prefix parallel prefix_parallel dual_parallel}
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-256}
THRESHOLD=${THRESHOLD:-0.9}

# The model arguments in which a setting differs, by their published names.
setting_args() {
    local one_a_step="diffusion_steps=$MAX_NEW_TOKENS,alg=entropy"
    local one_a_block="diffusion_steps=$((MAX_NEW_TOKENS / ${BLOCK_LENGTH:-32}))"
    local by_threshold="$one_a_block,alg=confidence_threshold,threshold=$THRESHOLD"
    case $1 in
        baseline) echo "$one_a_step" ;;
        prefix) echo "$one_a_step,use_cache=true" ;;
        parallel) echo "$by_threshold" ;;
        prefix_parallel) echo "$by_threshold,use_cache=true" ;;
        dual_parallel) echo "$by_threshold,use_cache=true,dual_cache=true" ;;
        *)
            echo "SETTINGS: '$1' is none of baseline prefix parallel prefix_parallel dual_parallel" >&2
            return 2
            ;;
    esac
}

# run_settings TASK [argument of lm-eval ...]
run_settings() {
    local task=$1 setting args
    shift
    for setting in $SETTINGS; do setting_args "$setting" >/dev/null; done
    for setting in $SETTINGS; do
        args=$(setting_args "$setting")${BLOCK_LENGTH:+,block_length=$BLOCK_LENGTH}
        echo "== $task, $setting: $args" >&2
        accelerate launch --quiet eval.py --tasks "$task" --confirm_run_unsafe_code --model dream \
            --model_args "pretrained=$MODEL,max_new_tokens=$MAX_NEW_TOKENS,$args,show_speed=true" \
            --output_path "results/$task/$setting" --log_samples --batch_size 1 "$@" || exit 2
    done
}
