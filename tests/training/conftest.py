# SPDX-License-Identifier: Apache-2.0
"""A plain Qwen2 checkpoint with a byte-level ChatML tokenizer, small enough to train within a test, and records for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fastdllm.training.samples import FAST_DLLM_V2_TEMPLATE

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 2 are special, 3 to 258 bytes; the first free id is 259."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=259, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = FAST_DLLM_V2_TEMPLATE
    return fast


def tiny_qwen2(folder: Path, vocab_size: int = 264, tied: bool = True, heads: int = 4) -> Path:
    """Save a seeded random Qwen2 of 2 layers; pad_token_id is the end of a turn, as in the published config."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,  # attention far from uniform, so that a wrong mask shows
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca.json"
    records = [{"instruction": f"Say {n}.", "output": "one " * n} for n in range(1, 13)]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(autouse=True)
def without_deepspeed() -> Iterator[None]:
    """transformers keeps the last --deepspeed, a refused one too, for every model of the process."""
    yield
    unset_hf_deepspeed_config()
