# SPDX-License-Identifier: Apache-2.0
# Sourced by eval_gsm8k.sh and eval_humaneval.sh: runs a task under the published settings, one after the other.
#
#   MODEL=...       hub id, local folder or a shipped checkpoint (tiny-llada)
#   TASK=...        another task of the same kind, for instance one that needs no network
#   SETTINGS="..."  some of: baseline prefix parallel prefix_parallel dual_parallel factor dual_factor
#   GEN_LENGTH, BLOCK_LENGTH, THRESHOLD, FACTOR
#
# Results and samples go to results/<task>/<setting>/ next to this file. Arguments go to lm-eval unchanged.

export WITHOUT_A_NETWORK="MODEL=tiny-llada TASK=gsm_symbolic_chat bash llada/eval_gsm8k.sh --num_fewshot 0 --apply_chat_template"
MODEL=${MODEL:-GSAI-ML/LLaDA-8B-Instruct}
SETTINGS=${SETTINGS:-baseline prefix parallel prefix_parallel dual_parallel}
GEN_LENGTH=${GEN_LENGTH:-256}
BLOCK_LENGTH=${BLOCK_LENGTH:-32}
THRESHOLD=${THRESHOLD:-0.9}
FACTOR=${FACTOR:-1.0}

# The model arguments in which a setting differs, by their published names.
setting_args() {
    local one_a_step="steps=$GEN_LENGTH" one_a_block="steps=$((GEN_LENGTH / BLOCK_LENGTH))"
    case $1 in
        baseline) echo "$one_a_step" ;;
        prefix) echo "$one_a_step,use_cache=True" ;;
        parallel) echo "$one_a_block,threshold=$THRESHOLD" ;;
        prefix_parallel) echo "$one_a_block,use_cache=True,threshold=$THRESHOLD" ;;
        dual_parallel) echo "$one_a_block,use_cache=True,dual_cache=True,threshold=$THRESHOLD" ;;
        factor) echo "$one_a_block,factor=$FACTOR" ;;
        dual_factor) echo "$one_a_block,use_cache=True,dual_cache=True,factor=$FACTOR" ;;
        *)
            echo "SETTINGS: '$1' is none of baseline prefix parallel prefix_parallel dual_parallel factor dual_factor" >&2
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
        args=$(setting_args "$setting")
        echo "== $task, $setting: $args" >&2
        accelerate launch --quiet eval_llada.py --tasks "$task" --confirm_run_unsafe_code --model llada_dist \
            --model_args "model_path=$MODEL,gen_length=$GEN_LENGTH,block_length=$BLOCK_LENGTH,$args,show_speed=True" \
            --output_path "results/$task/$setting" --log_samples "$@" || exit 2
    done
}
