#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Fine-tune Fast-dLLM v2 7B on Alpaca, from any folder:
#     bash train_scripts/finetune_alpaca.sh [options of finetune.py]
# MODEL, DATA, OUTPUT and GPUS replace the defaults; options given here win over those below. Without a GPU it runs
# on the CPU, which is enough for a tiny model.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

model=${MODEL:-Efficient-Large-Model/Fast_dLLM_v2_7B}
data=${DATA:-data/alpaca/train_conversation}
output=${OUTPUT:-outputs/finetune_alpaca}
gpus=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}

if [[ ! -e $data ]]; then
    echo "finetune_alpaca: no data at $data; set DATA to a conversation or Alpaca JSON file (v2/train_scripts/README.md has a link)" >&2
    exit 2
fi
if [[ ! $gpus =~ ^(0|[1-9][0-9]{0,3})$ ]]; then
    echo "finetune_alpaca: GPUS=${gpus@Q} is no number of GPUs; 0 trains on the CPU" >&2
    exit 2
fi

if ((gpus > 0)); then
    launch=(torchrun --standalone --nproc_per_node "$gpus")
    precision=(--bf16 --gradient_checkpointing)
    # 7B parameters with AdamW do not fit one device: shard optimiser and gradients where DeepSpeed is installed.
    if python -c 'import deepspeed' 2>/dev/null; then precision+=(--deepspeed "$here/configs/zero2.json"); fi
else
    launch=(python)
    precision=(--use_cpu)
fi

"${launch[@]}" "$here/finetune.py" \
    --model_name_or_path "$model" \
    --dataset_path "$data" \
    --output_dir "$output" \
    --num_train_epochs 1 \
    --learning_rate 1e-5 \
    --lr_scheduler_type constant_with_warmup \
    --warmup_share 0.03 \
    --max_grad_norm 1.0 \
    --context_length 512 \
    --pack \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --logging_steps 1 \
    --save_steps 1000 \
    --save_total_limit 2 \
    "${precision[@]}" \
    "$@"
