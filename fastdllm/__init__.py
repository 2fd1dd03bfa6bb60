# SPDX-License-Identifier: Apache-2.0
"""Fast inference for diffusion language models: LLaDA, Dream, Fast-dLLM v2 and their relatives.

model = fastdllm.load("tiny-llada")
out = fastdllm.generate(model, [{"role": "user", "content": "..."}], gen_length=256)
print(out.texts[0], out.stats.to_json())
"""

from fastdllm.async_engine import AsyncEngine
from fastdllm.config import DecodeConfig
from fastdllm.decide import Decision, decide
from fastdllm.engine import Request, Result, Step
from fastdllm.generation import Output, generate, stream, stream_text
from fastdllm.hidden import hidden_states
from fastdllm.likelihood import Score, log_likelihoods
from fastdllm.models import Model, load
from fastdllm.prompt_cache import PromptCache
from fastdllm.prompts import encode
from fastdllm.registry import register
from fastdllm.stats import Stats
from fastdllm.trace import Trace, watch

__version__ = "0.2.0"
__all__ = [
    "AsyncEngine",
    "Decision",
    "DecodeConfig",
    "Model",
    "Output",
    "PromptCache",
    "Request",
    "Result",
    "Score",
    "Stats",
    "Step",
    "Trace",
    "decide",
    "encode",
    "generate",
    "hidden_states",
    "load",
    "log_likelihoods",
    "register",
    "stream",
    "stream_text",
    "watch",
]
