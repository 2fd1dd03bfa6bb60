# SPDX-License-Identifier: Apache-2.0
"""Fast inference for diffusion language models: LLaDA, Dream and Fast-dLLM v2.

model = fastdllm.load("tiny-llada")
out = fastdllm.generate(model, [[{"role": "user", "content": "..."}]], gen_length=256)
print(out.texts[0], out.stats.to_json())
"""

from fastdllm.config import DecodeConfig
from fastdllm.decide import Decision, decide
from fastdllm.generation import Output, generate, stream
from fastdllm.models import Model, load
from fastdllm.registry import register
from fastdllm.text import stream_text

__version__ = "0.2.0"
__all__ = ["Decision", "DecodeConfig", "Model", "Output", "decide", "generate", "load", "register", "stream", "stream_text"]
