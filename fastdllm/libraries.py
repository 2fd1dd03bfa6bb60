# SPDX-License-Identifier: Apache-2.0
"""Libraries that only a part of the package needs: whether they are there, and what to install where they are not."""

from __future__ import annotations

from importlib.util import find_spec

# What to install for a module whose own name does not say it, or which needs others as well.
INSTALL = {
    "tokenizers": "transformers",
    "lm_eval": "lm_eval transformers accelerate datasets",
    "fastapi": "fastapi uvicorn pydantic prometheus-client transformers",
    "uvicorn": "fastapi uvicorn pydantic prometheus-client transformers",
    "pydantic": "fastapi uvicorn pydantic prometheus-client transformers",
    "prometheus_client": "prometheus-client",
    "ray": "'ray[serve]'",
    "matplotlib": "matplotlib",
    "peft": "peft",
    "rich": "rich",
    "scipy": "scipy",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "triton": "triton",
}


def has_tokenizers() -> bool:
    """Whether texts can be made into ids."""
    return all(_has(name) for name in ("tokenizers", "transformers"))


def hint(what: str, module: str) -> str:
    """One line: what needs which library, and how to get it."""
    return f"{what} needs {module}: pip install {INSTALL.get(module, module)}"


def missing(error: ModuleNotFoundError) -> str | None:
    """The library whose absence raised the error, if it is one that a part of this project needs."""
    name = (error.name or "").partition(".")[0]
    return name if name in INSTALL else None


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
