# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with block-diffusion noise that a resumed or differently distributed run draws again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fastdllm import whole
from fastdllm.training.checkpoint import save_tokenizer
from fastdllm.training.finite import FiniteTrainer
from fastdllm.training.objective import Noise, choose_masked, draw_noise

EVALUATION = -1  # stands for the step when evaluating, so that every evaluation draws the same noise


def row_seed(seed: int, step: int, index: int) -> int:
    """A seed for one row at one optimiser step, unlike those of neighbouring steps and rows."""
    digest = hashlib.blake2b(f"{seed} {step} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def row_noise(seed: int, step: int, rows: list[int], length: int) -> Noise:
    """Noise [B, T] that depends on the run's seed, the step and each row's number in the data set, nothing else.

    So it does not matter how rows are spread over processes and micro-batches, nor whether the run was resumed.
    """
    generators = (torch.Generator().manual_seed(row_seed(seed, step, row)) for row in rows)
    drawn = [draw_noise(1, length, generator) for generator in generators]
    return Noise(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


class BlockDiffusionTrainer(FiniteTrainer):
    """Trains `Fast_dLLM_QwenForCausalLM`, bare or under peft, on batches made by `Collator`."""

    def __init__(self, *args: Any, tokenizer: PreTrainedTokenizerFast, block: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokenizer_to_save = tokenizer
        self.block = block
        # The loss is divided by the targets of the whole step, on all processes.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Draw the batch's noise and leave the loss to the model's forward."""
        batch = {name: value for name, value in inputs.items() if name != "index"}
        labels, positions = batch["labels"], batch["position_ids"]
        step = self.state.global_step if model.training else EVALUATION
        rows = inputs["index"].tolist()  # sync: the noise is drawn on the host, the same for every device
        noise = row_noise(self.args.seed, step, rows, labels.shape[1])
        noise = Noise(*(part.to(labels.device) for part in noise))
        batch["masked"] = choose_masked(labels, positions, self.block, noise)
        return super().compute_loss(model, batch, return_outputs, num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A sharded model is gathered tensor by tensor, which makes a second copy of a tied head: leave it out."""
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        if state_dict is not None and base.config.tie_word_embeddings:
            state_dict = {name: tensor for name, tensor in state_dict.items() if not name.endswith("lm_head.weight")}
        super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Every saved folder, checkpoints included, holds the tokenizer with the mask, and an adapter its model's config."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            with whole.filling(output_dir or self.args.output_dir) as partial:
                save_tokenizer(self.tokenizer_to_save, partial)
                if hasattr(model, "peft_config"):  # an adapter of a plain Qwen2 says nothing of blocks and of the mask
                    model.get_base_model().config.save_pretrained(partial)
