# SPDX-License-Identifier: Apache-2.0
"""Fast inference for diffusion language models: LLaDA, Dream, Fast-dLLM v2 and their relatives.

model = fastdllm.load("tiny-llada")
out = fastdllm.generate(model, [{"role": "user", "content": "..."}], gen_length=256)
print(out.texts[0], out.stats.to_json())
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdllm.async_engine import AsyncEngine
    from fastdllm.config import DecodeConfig
    from fastdllm.decisions import Decision, decide
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
# Where each of them is. A name is imported when it is first used, so that a command which needs none (`fastdllm --help`)
# does not wait for torch. No module may have the name of something here: importing it would hide that.
_HOMES = {
    "async_engine": ("AsyncEngine",),
    "config": ("DecodeConfig",),
    "decisions": ("Decision", "decide"),
    "engine": ("Request", "Result", "Step"),
    "generation": ("Output", "generate", "stream", "stream_text"),
    "hidden": ("hidden_states",),
    "likelihood": ("Score", "log_likelihoods"),
    "models": ("Model", "load"),
    "prompt_cache": ("PromptCache",),
    "prompts": ("encode",),
    "registry": ("register",),
    "stats": ("Stats",),
    "trace": ("Trace", "watch"),
}


def __getattr__(name: str) -> Any:
    """A public name, or a module of this package."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is not None:
        value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
