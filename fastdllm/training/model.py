# SPDX-License-Identifier: Apache-2.0
"""The network to train: transformers' Qwen2 under the published name, with the block-diffusion loss in `forward`.

Fast-dLLM v2's weights are Qwen2's, so training needs no network of its own. The loss is part of `forward` because
DDP, FSDP and DeepSpeed act on that call. The class and the configuration carry the published names, which is how
`save_pretrained` writes the published format.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastdllm import whole
from fastdllm.training.masks import dense_mask, flex_mask
from fastdllm.training.objective import (
    complementary_views,
    noisy_and_clean,
    shifted_cross_entropy,
    target_states,
)

# Where AutoModel finds the published modelling code for a folder that has no copy of it.
PUBLISHED_CODE = "Efficient-Large-Model/Fast_dLLM_v2_7B--"
AUTO_MAP = {
    "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
    "AutoModel": "modeling.Fast_dLLM_QwenModel",
    "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
}


class Fast_dLLM_QwenConfig(Qwen2Config):
    """Qwen2's configuration and `bd_size`, the tokens of a diffusion block."""

    model_type = "Fast_dLLM_Qwen"

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json with the field names of the published one, whichever transformers runs.

        The published code reads `rope_theta`, for which transformers 5 writes `rope_parameters`, and falls back to
        10000 without it.
        """
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        rope = fields.pop("rope_parameters", None) or {}
        fields["rope_theta"] = rope.get("rope_theta") or fields["rope_theta"]
        fields.pop("rope_scaling", None)  # none is the default; transformers 5 warns at the name
        fields["use_cache"] = True  # the Trainer turns it off while it trains
        fields["torch_dtype"] = fields.pop("dtype", fields.get("torch_dtype"))
        fields["auto_map"] = {name: PUBLISHED_CODE + target for name, target in AUTO_MAP.items()}
        whole.write_text(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")


class Fast_dLLM_QwenForCausalLM(Qwen2ForCausalLM):
    """Qwen2 whose `forward` returns the block-diffusion loss when it is told which tokens to mask."""

    config_class = Fast_dLLM_QwenConfig

    def __init__(self, config: Fast_dLLM_QwenConfig) -> None:
        super().__init__(config)
        # An embedding does not learn its padding row, and the published pad token is <|im_end|>, the end of a turn.
        self.model.embed_tokens.padding_idx = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
        masked: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The loss of both complementary views of a batch; without `masked`, Qwen2's own forward.

        input_ids, labels, position_ids, documents: [B, T] as `Collator` makes them. masked: [B, T] bool from
        `choose_masked`. num_items_in_batch: the number of targets to divide by, when the batch is part of more.
        """
        if masked is None:
            return super().forward(input_ids=input_ids, labels=labels, position_ids=position_ids, **kwargs)
        length = input_ids.shape[1]
        flex = self.config._attn_implementation == "flex_attention"
        if not flex:  # of the process: recomputed layers attend in the backward pass, outside any context manager
            torch.backends.cuda.enable_cudnn_sdp(False)  # see network.BACKENDS
        attention = (flex_mask if flex else dense_mask)(
            position_ids.repeat(2, 1), documents.repeat(2, 1), self.config.bd_size
        )
        noisy = complementary_views(input_ids, labels, masked, self.config.mask_token_id)
        hidden = self.model(
            input_ids=noisy_and_clean(noisy, input_ids),
            position_ids=position_ids.repeat(2, 2),
            attention_mask=attention,
            use_cache=False,
        ).last_hidden_state
        logits = self.lm_head(target_states(hidden[:, :length], masked))
        return CausalLMOutputWithPast(loss=shifted_cross_entropy(logits, labels, num_items_in_batch))


AutoConfig.register("Fast_dLLM_Qwen", Fast_dLLM_QwenConfig, exist_ok=True)
AutoModelForCausalLM.register(Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM, exist_ok=True)
