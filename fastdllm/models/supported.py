# SPDX-License-Identifier: Apache-2.0
"""The published models that are known to load: what the table "Supported models" of the documents is made from."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A model on the hub.

    id: "owner/name".
    family: the file in `fastdllm/models/` that reads it.
    size: its parameters, as its name or card says.
    options: what `load` needs beyond the id.
    note: what a reader should know.
    """

    id: str
    family: str
    size: str
    options: str = ""
    note: str = ""


LLADA, DREAM, V2 = "llada", "dream", "fast_dllm_v2"
BLOCKS = "blocks of any trained size: give `block_size` where config.json lacks it"
DRAFTS = "`decoder=self_speculate` gives its autoregressive tokens"
EDITS = "`decoder=joint_threshold` edits tokens, as its own sampler does"
STEPS = "`steps_per_block` is the `steps` of its own sampler"
SUPPORTED = (
    Published("GSAI-ML/LLaDA-8B-Base", LLADA, "8B"),
    Published("GSAI-ML/LLaDA-8B-Instruct", LLADA, "8B"),
    Published("GSAI-ML/LLaDA-1.5", LLADA, "8B"),
    Published("d3LLM/d3LLM_LLaDA", LLADA, "8B", note="distilled to more tokens a forward"),
    Published("Zigeng/dParallel-LLaDA-8B-instruct", LLADA, "8B", note="distilled to more tokens a forward"),
    Published("inclusionAI/LLaDA-MoE-7B-A1B-Base", "llada_moe", "7B"),
    Published("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", "llada_moe", "7B"),
    Published("inclusionAI/LLaDA2.0-mini", "llada2_moe", "16B", note=STEPS),
    Published("inclusionAI/LLaDA2.1-mini", "llada2_moe", "16B", note=EDITS),
    Published("Dream-org/Dream-v0-Base-7B", DREAM, "7B"),
    Published("Dream-org/Dream-v0-Instruct-7B", DREAM, "7B"),
    Published("Dream-org/Dream-Coder-v0-Base-7B", DREAM, "7B"),
    Published("Dream-org/Dream-Coder-v0-Instruct-7B", DREAM, "7B"),
    Published("apple/DiffuCoder-7B-Base", DREAM, "7B"),
    Published("apple/DiffuCoder-7B-Instruct", DREAM, "7B"),
    Published("apple/DiffuCoder-7B-cpGRPO", DREAM, "7B"),
    Published("d3LLM/d3LLM_Dream", DREAM, "7B", note="distilled to more tokens a forward"),
    Published("Zigeng/dParallel_Dream_7B_Instruct", DREAM, "7B", note="distilled to more tokens a forward"),
    Published("Efficient-Large-Model/Fast_dLLM_v2_1.5B", V2, "1.5B"),
    Published("Efficient-Large-Model/Fast_dLLM_v2_7B", V2, "7B"),
    Published("JetLM/SDAR-1.7B-Chat", "sdar", "1.7B", note=BLOCKS),
    Published("JetLM/SDAR-4B-Chat", "sdar", "4B", note=BLOCKS),
    Published("JetLM/SDAR-8B-Chat", "sdar", "8B", note=BLOCKS),
    Published("Gen-Verse/TraDo-4B-Instruct", "sdar", "4B", note=BLOCKS),
    Published("Gen-Verse/TraDo-8B-Instruct", "sdar", "8B", note=BLOCKS),
    Published("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", "a2d", "0.6B"),
    Published("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", "a2d", "0.6B", "block_size=32"),
    Published("dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1", "a2d", "0.5B"),
    Published("dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1", "a2d", "0.5B", "block_size=32"),
    Published("ByteDance-Seed/Stable-DiffCoder-8B-Base", "stable_diffcoder", "8B"),
    Published("ByteDance-Seed/Stable-DiffCoder-8B-Instruct", "stable_diffcoder", "8B"),
    Published("nvidia/Nemotron-Labs-Diffusion-3B", "nemotron", "3B", note=DRAFTS),
    Published("nvidia/Nemotron-Labs-Diffusion-8B", "nemotron", "8B", note=DRAFTS),
    Published("nvidia/Nemotron-Labs-Diffusion-14B", "nemotron", "14B", note=DRAFTS),
)
