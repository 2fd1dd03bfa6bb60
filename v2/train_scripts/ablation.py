# SPDX-License-Identifier: Apache-2.0
"""What this recipe's departures from the published one are worth, measured on a CPU in minutes.

A small Qwen2 learns from random weights to sort digits, an answer that needs the whole prompt and whose length
varies. Each variant sees the same samples for the same number of steps; all are judged as decoding uses them: alone,
the last block filled with masks. `python v2/train_scripts/ablation.py` prints the table of README.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import finetune
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import fastdllm
from fastdllm import whole
from fastdllm.arguments import COUNT, Parser
from fastdllm.shell import one_line
from fastdllm.training.checkpoint import load_for_training
from fastdllm.training.collator import Collator, Row
from fastdllm.training.objective import choose_masked
from fastdllm.training.records import Conversation
from fastdllm.training.samples import encode, pad_to_block
from fastdllm.training.trainer import EVALUATION, row_noise

BLOCK = 8
VARIANTS = {
    "this recipe": [],
    "padded with end tokens": ["--pad_with", "end"],
    "no document mask": ["--document_mask", "false"],
    "no padding to the block": ["--pad_with", "none"],
    "neither (as published)": ["--document_mask", "false", "--pad_with", "none"],
    "no clipping": ["--max_grad_norm", "0"],
}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
    "{% else %}={{ m['content'] }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def samples(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Conversations: 3 to 14 digits, and the same digits sorted."""
    draw = random.Random(seed)
    for _ in range(count):
        digits = draw.choices("0123456789", k=draw.randint(3, 14))
        yield [
            {"role": "user", "content": "".join(digits)},
            {"role": "assistant", "content": "".join(sorted(digits))},
        ]


def new_model(folder: Path, seed: int) -> None:
    """A random Qwen2 of 0.15 million weights over digits, with a row left for the mask."""
    vocabulary = {token: i for i, token in enumerate(["<|im_end|>", *"0123456789="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


@torch.no_grad()
def held_out_loss(folder: Path, talks: list[list[dict[str, str]]]) -> float:
    """Loss of unseen samples, each in a row of its own with its last block filled."""
    model, tokenizer = load_for_training(str(folder))
    mask_id = model.config.mask_token_id
    rows = [Row(i, [pad_to_block(encode(Conversation("", t), tokenizer), BLOCK, mask_id)]) for i, t in enumerate(talks)]
    batch = Collator(mask_id)(rows)
    noise = row_noise(0, EVALUATION, batch.pop("index").tolist(), batch["labels"].shape[1])
    masked = choose_masked(batch["labels"], batch["position_ids"], BLOCK, noise)
    return model.eval()(**batch, masked=masked).loss.item()


def solved(folder: Path, talks: list[list[dict[str, str]]], threshold: float) -> float:
    """Share of unseen samples whose decoded answer is right."""
    model = fastdllm.load(str(folder), device="cpu")
    prompts = [talk[0]["content"] + "=" for talk in talks]
    texts = fastdllm.generate(model, prompts, gen_length=24, threshold=threshold).texts
    return sum(text.strip() == talk[1]["content"] for text, talk in zip(texts, talks, strict=True)) / len(talks)


def train(folder: Path, seed: int, steps: int, extra: list[str]) -> float:
    """Run finetune.py's main on `folder`/model; returns the largest gradient norm after the warm-up."""
    argv = (
        f"--model_name_or_path {folder}/model --dataset_path {folder}/train.jsonl --output_dir {folder}/out"
        f" --bd_size {BLOCK} --context_length 128 --pack --max_steps {steps} --per_device_train_batch_size 8"
        f" --learning_rate 3e-3 --warmup_steps 50 --lr_scheduler_type cosine --seed {seed} --use_cpu"
        " --disable_tqdm true --report_to none --save_strategy no --logging_steps 1"
    )
    with contextlib.redirect_stdout(open(os.devnull, "w", encoding="utf-8")):
        finetune.main([*argv.split(), *extra])
    history = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return max(entry["grad_norm"] for entry in history[50:] if "grad_norm" in entry)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=COUNT, default=500, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=COUNT, default=2, help="runs of each variant")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), help="rows of the table")
    arguments = parser.parse_args()
    talks = list(samples(200, seed=-1))
    print("| variant | held-out loss | solved at 1 | solved at 0.9 | largest gradient norm |\n|---|---|---|---|---|")
    for name in arguments.variants:
        results = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                new_model(folder / "model", seed)
                lines = (json.dumps({"messages": talk}) for talk in samples(8000, seed))
                whole.write_text(folder / "train.jsonl", "\n".join(lines))
                norm = train(folder, seed, arguments.steps, VARIANTS[name])
                scores = (100 * solved(folder / "out", talks, threshold) for threshold in (1.0, 0.9))
                results.append((held_out_loss(folder / "out", talks), *scores, norm))
        loss, exact, parallel, norm = ([f"{value:.3g}" for value in column] for column in zip(*results, strict=True))
        print("|", " | ".join([name, *(", ".join(column) for column in (loss, exact, parallel, norm))]), "|", flush=True)


if __name__ == "__main__":
    with one_line("ablation"):
        main()
