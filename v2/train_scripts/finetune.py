# SPDX-License-Identifier: Apache-2.0
"""Turn a Qwen2 checkpoint into a Fast-dLLM v2 one, or fine-tune one, on conversations.

    python v2/train_scripts/finetune.py --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct --dataset_path chats.jsonl \
        --conversation_template fast_dllm_v2 --output_dir outputs/converted --num_train_epochs 1

Options are those below and all of transformers' TrainingArguments. On several devices: accelerate launch or torchrun
(README.md in this folder).
"""

from __future__ import annotations

from fastdllm.shell import one_line, shell  # first: from here on an interruption is one line

# isort: split
import difflib
import itertools
import math
import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from accelerate.utils import DistributedType
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerFast, TrainingArguments, set_seed
from transformers.integrations import is_tensorboard_available
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fastdllm import whole
from fastdllm.arguments import Parser
from fastdllm.training.checkpoint import MASK_TOKEN, check_output, checkpoint_to_resume, load_for_training, save_tokenizer
from fastdllm.training.collator import Collator, Rows
from fastdllm.training.finite import train_or_exit
from fastdllm.training.objective import IGNORE
from fastdllm.training.records import Conversation, Record, encodable, keep_good, read_records, to_conversation
from fastdllm.training.samples import FAST_DLLM_V2_TEMPLATE, Sample, encode, fit, pack, pad_to_block
from fastdllm.training.trainer import BlockDiffusionTrainer

if TYPE_CHECKING:
    from peft import LoraConfig

# Names that the published script or an older transformers knew, and what replaces each.
REPLACED = {
    "block_size": "use --context_length",
    "dispatch_batches": "use --accelerator_config",
    "evaluation_strategy": "use --eval_strategy",
    "fp16_backend": "leave it out",
    "fsdp_min_num_params": "use --fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "use --fsdp_config",
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "half_precision_backend": "leave it out",
    "include_inputs_for_metrics": "use --include_for_metrics inputs",
    "include_tokens_per_second": "use --include_num_input_tokens_seen non_padding, which also logs tokens a second",
    "jit_mode_eval": "use --torch_compile",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "lora_r": "use --lora_rank",
    "no_cuda": "use --use_cpu",
    "overwrite_output_dir": "leave it out; --resume_from_checkpoint continues a run",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "push_to_hub_model_id": "use --hub_model_id",
    "push_to_hub_organization": "use --hub_model_id",
    "push_to_hub_token": "use --hub_token",
    "save_safetensors": "leave it out; checkpoints are safetensors",
    "split_batches": "use --accelerator_config",
    "torchdynamo": "use --torch_compile_backend",
    "use_lora": "use --lora",
    "use_mps_device": "leave it out",
    "warmup_ratio": "use --warmup_share",
    "xpu_backend": "use --ddp_backend",
}

# The least and the most that a number may be; a NaN is neither. Outside, some fail long after the model is loaded, some
# train no model (a rate of -1), save no checkpoint (every -1 steps), or start processes until the machine is full.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "neftune_noise_alpha"), (0, 1e30)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "warmup_share", "lora_dropout"), (0, 1)),
    **dict.fromkeys(("num_train_epochs", "save_steps", "logging_steps", "eval_steps", "eval_delay"), (0, 1e9)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "lora_alpha"), (1, 1e9)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), (1, 1e9)),
    "dataloader_num_workers": (0, 256),
    "lora_rank": (1, 65536),
    "label_smoothing_factor": (0, 0),  # the objective has none
}


@dataclass
class ModelArguments:
    """The checkpoint to start from and what of it to train."""

    model_name_or_path: str = field(
        metadata={"help": "Qwen2 or Fast-dLLM v2 checkpoint: a shipped name, a folder or a hub id"}
    )
    bd_size: int | None = field(
        default=None, metadata={"help": "tokens of a diffusion block; default: the checkpoint's, 32 for plain Qwen2"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={"help": "dtype of the weights; auto: bfloat16 under --lora with --bf16, else float32 (mixed precision)"},
    )
    lora: bool = field(default=False, metadata={"help": "train low-rank adapters instead of all weights"})
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the adapters, over the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapters"})
    merge_lora: bool = field(
        default=False, metadata={"help": "also save the whole model, adapters added in, to OUTPUT_DIR/merged"}
    )


@dataclass
class DataArguments:
    """What to train on and how it is cut into rows."""

    dataset_path: str = field(
        metadata={"help": "a .json or .jsonl file, or a folder of them: messages, ShareGPT, Alpaca, ... (README.md)"}
    )
    eval_dataset_path: str | None = field(default=None, metadata={"help": "the same, for --eval_strategy"})
    context_length: int = field(
        default=2048, metadata={"help": "longest row in tokens, a multiple of bd_size (published: --block_size)"}
    )
    pack: bool = field(default=False, metadata={"help": "fill each row with several whole samples"})
    document_mask: bool = field(
        default=True, metadata={"help": "samples packed into one row do not see each other (published: they do)"}
    )
    pad_with: Literal["mask", "end", "none"] = field(
        default="mask",
        metadata={
            "help": "what fills each sample's last block: masks that are no targets (paper), end tokens that are, or nothing"
        },
    )
    on_bad_record: Literal["skip", "error"] = field(
        default="skip", metadata={"help": "a record without anything to train on is reported and left out, or fatal"}
    )
    conversation_template: Literal["checkpoint", "fast_dllm_v2"] = field(
        default="checkpoint",
        metadata={"help": "the checkpoint's chat template, or ChatML with the published model's system prompt"},
    )


@dataclass
class FinetuneArguments(TrainingArguments):
    """transformers' options with the defaults of this recipe."""

    learning_rate: float = field(default=2e-5, metadata={"help": "peak learning rate (paper: 2e-5 for 1.5B, 1e-5 for 7B)"})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "shape of the learning rate"})
    warmup_share: float = field(
        default=0.03, metadata={"help": "share of all steps spent warming up, unless --warmup_steps says how many"}
    )
    logging_steps: float = field(default=10, metadata={"help": "steps between log lines"})
    report_to: str = field(
        default="tensorboard" if is_tensorboard_available() else "none",
        metadata={"help": "where losses are logged besides the terminal: TensorBoard where it is installed"},
    )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warm-up as a share works under transformers 4 and 5 alike, which name it differently."""
        if self.warmup_steps > 0:
            return super().get_warmup_steps(num_training_steps)
        return math.ceil(self.warmup_share * num_training_steps)


KINDS = (ModelArguments, DataArguments, FinetuneArguments)


class OptionParser(Parser, HfArgumentParser):
    """transformers' parser of dataclasses, without its hundreds of lines of usage around a mistake."""


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, FinetuneArguments]:
    """Command line to options; abbreviations and unknown names are errors."""
    parser = OptionParser(KINDS, description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, value in itertools.pairwise(["", *argv]):
        if not value or (value.startswith("--") and value.endswith("=")):
            parser.error(f"{value.rstrip('=') or name} is empty; leave it out where nothing is meant")
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except PackageNotFoundError as error:  # of what an option needs, DeepSpeed among them
        parser.error(str(error).removeprefix("No package metadata was found for ").strip())
    except Exception as error:  # of whatever transformers does with a value: an infinite --save_steps, an unknown key
        parser.error(str(error))
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        if name in REPLACED:
            parser.error(f"--{name} is no option any more: {REPLACED[name]}")
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(f"--{name}", known, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the known ones"
        parser.error(f"unknown option {' '.join(unknown)}; {hint}")
    model, data, training = parsed
    if training.output_dir is None:
        parser.error("--output_dir is needed")
    given = {**vars(training), **vars(model)}
    for name, (least, most) in RANGES.items():
        if given[name] is not None and not least <= given[name] <= most:
            parser.error(f"--{name} {given[name]} must lie in [{least:g}, {most:g}]")
    if training.max_steps == 0 or training.max_steps < -1:
        parser.error(f"--max_steps {training.max_steps} must be at least 1; without it --num_train_epochs decides")
    if training.metric_for_best_model not in (None, "loss", "eval_loss"):
        parser.error(f"--metric_for_best_model {training.metric_for_best_model} is unknown; allowed is eval_loss")
    if not encodable(training.output_dir):
        parser.error(f"--output_dir {training.output_dir!r} is not UTF-8, which tokenizers are saved under only")
    if model.merge_lora and not model.lora:
        parser.error("--merge_lora needs --lora")
    return model, data, training


def load_samples(
    path: str, tokenizer: PreTrainedTokenizerFast, data: DataArguments, block: int, quiet: bool
) -> list[list[Sample]]:
    """Read, tokenise, cut, pad and pack; prints what was left out and what was kept."""

    mask_id, end_id = tokenizer.convert_tokens_to_ids(MASK_TOKEN), tokenizer.eos_token_id
    padding = {"mask": (mask_id, IGNORE), "end": (end_id, end_id), "none": None}[data.pad_with]

    def report(message: str) -> None:
        if not quiet:
            tqdm.write(f"left out: {message}", file=sys.stderr)

    def to_sample(record: Record) -> Sample:
        conversation: Conversation = to_conversation(record)
        sample = fit(encode(conversation, tokenizer), data.context_length, record.where)
        return pad_to_block(sample, block, *padding) if padding else sample

    records = tqdm(read_records(Path(path)), desc=f"reading {path}", unit=" records", disable=quiet)
    samples = list(keep_good(records, to_sample, data.on_bad_record, report))
    if not samples:
        raise ValueError(f"dataset_path={path!r} has no usable record")
    rows = pack(samples, data.context_length) if data.pack else [[sample] for sample in samples]
    if not quiet:
        targets = sum(int((sample.labels >= 0).sum()) for sample in samples)
        print(f"{path}: {len(samples)} samples in {len(rows)} rows, {targets} target tokens", file=sys.stderr)
    return rows


def weights_dtype(model: ModelArguments, training: TrainingArguments) -> torch.dtype:
    """Trained weights stay in float32, as AdamW needs; a frozen base may be bfloat16."""
    frozen = model.lora and training.bf16
    return getattr(torch, ("bfloat16" if frozen else "float32") if model.dtype == "auto" else model.dtype)


def lora_config(model: ModelArguments) -> LoraConfig:
    """Adapters on every projection of the transformer layers."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )


def check_processes(training: TrainingArguments) -> None:
    """ValueError where processes would each train a model of its own, or would not share it as they were told to."""
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started != training.world_size:
        raise ValueError(f"{started} processes were started, but they find no GPUs; --use_cpu trains on the CPU")
    if training.deepspeed and training.distributed_state.distributed_type != DistributedType.DEEPSPEED:
        raise ValueError(
            f"--deepspeed {training.deepspeed} needs GPUs, and torchrun or accelerate launch also where there is one"
        )


def check_precision(training: TrainingArguments) -> None:
    """ValueError for fp16 on a CPU, whoever asked for it: accelerate would train in float32 without a word."""
    wanted = training.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"
    if wanted and training.device.type == "cpu":
        raise ValueError("mixed precision fp16 needs a GPU; --bf16, or neither, trains on the CPU")


def prepare(argv: list[str]) -> tuple[ModelArguments, FinetuneArguments, BlockDiffusionTrainer, Path | None]:
    """Everything before the first step. Raises ValueError and OSError for what the user should mend."""
    options, data, training = parse(argv)
    check_processes(training)
    check_precision(training)
    check_output(Path(training.output_dir), training.resume_from_checkpoint)
    set_seed(training.seed)
    quiet = training.process_index != 0
    flex = training.device.type == "cuda"
    model, tokenizer = load_for_training(
        options.model_name_or_path,
        options.bd_size,
        weights_dtype(options, training),
        "flex_attention" if flex else "sdpa",
    )
    block, mask_id = model.config.bd_size, model.config.mask_token_id
    if data.context_length < 2 or data.context_length % block:
        raise ValueError(f"context_length={data.context_length} must be a positive multiple of bd_size={block}")
    if data.conversation_template == "fast_dllm_v2" or not tokenizer.chat_template:
        tokenizer.chat_template = FAST_DLLM_V2_TEMPLATE

    if options.lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(options))
    resume = None
    if training.resume_from_checkpoint:
        resume, passed_over = checkpoint_to_resume(training.resume_from_checkpoint, Path(training.output_dir), model)
        if not quiet:
            print(*passed_over, f"resuming from {resume}", sep="\n", file=sys.stderr)
    rows = load_samples(data.dataset_path, tokenizer, data, block, quiet)
    held_out = data.eval_dataset_path and load_samples(data.eval_dataset_path, tokenizer, data, block, quiet)

    training.remove_unused_columns = False
    # transformers 4 would checkpoint reentrantly, which loses the gradients of adapters on a frozen embedding.
    training.gradient_checkpointing_kwargs = training.gradient_checkpointing_kwargs or {"use_reentrant": False}
    # Flex attention compiles once a shape, so there every batch has the same one.
    width = data.context_length if flex else None
    try:
        trainer = BlockDiffusionTrainer(
            model=model,
            args=training,
            train_dataset=Rows(rows),
            eval_dataset=Rows(held_out) if held_out else None,
            data_collator=Collator(mask_id, width, data.document_mask),
            tokenizer=tokenizer,
            block=block,
        )
    except (ImportError, RuntimeError) as error:  # a library that an option needs: --report_to wandb
        raise ValueError(error) from error
    return options, training, trainer, resume


def merge(options: ModelArguments, output: Path, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> None:
    """Write the whole model with the adapters of `output` added in to `output`/merged.

    From the files, by one process: the trained model may be spread over all of them.
    """
    from peft import PeftModel

    unset_hf_deepspeed_config()  # ZeRO-3 would spread this model, too
    base, _ = load_for_training(options.model_name_or_path, options.bd_size, dtype)
    merged = PeftModel.from_pretrained(base, output).merge_and_unload()
    with whole.filling(output / "merged") as partial:
        merged.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)


def main(argv: list[str]) -> None:
    """Load, train, save. What the user should mend, a loss that is no number among it, is one line and exit code 2. So is a
    disk that fills, and an interruption is one line and exit code 130."""
    with shell("finetune"):
        run(argv)


def run(argv: list[str]) -> None:
    """`main`, without what the shell is told at its end."""
    with one_line("finetune"):
        options, training, trainer, resume = prepare(argv)
    train_or_exit(trainer, resume, "finetune")
    trainer.save_model()
    trainer.save_state()
    # No process may leave while another still writes or gathers, and all leave the group before any of them ends.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if options.merge_lora and training.should_save:
        merge(options, Path(training.output_dir), trainer.tokenizer_to_save, weights_dtype(options, training))


if __name__ == "__main__":
    main(sys.argv[1:])
