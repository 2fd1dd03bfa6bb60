# SPDX-License-Identifier: Apache-2.0
"""Where kernels run in the tests: compiled on a GPU, or in Triton's interpreter on a CPU.

The interpreter is chosen when Triton is imported, so this file decides before any test module of the folder imports it.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRET = not torch.cuda.is_available()
if INTERPRET:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before tests/kernels could choose its interpreter: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="package", autouse=True)
def language_patched_once() -> Iterator[None]:
    """Keep the interpreter's versions of `triton.language` between launches.

    The interpreter puts them in at each launch and at each call between kernels, and takes them out after a launch: a third
    of the time of these tests. Which ones a function needs depends only on the modules that its file imports.
    """
    if not INTERPRET:
        yield
        return
    from triton.runtime import interpreter

    patch, scopes = interpreter._patch_lang, {}

    def patch_once(fn: Callable[..., Any]) -> SimpleNamespace:
        modules = frozenset(value.__name__ for value in fn.__globals__.values() if isinstance(value, ModuleType))
        modules &= {"triton.language", "triton.language.core"}
        if modules not in scopes:
            scopes[modules] = patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch
    for scope in reversed(scopes.values()):
        if scope is not None:  # Triton before 3.5 has nothing to take out
            scope.restore()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cpu" and not INTERPRET:
        pytest.skip("kernels are compiled in this process, not interpreted")
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def ratio(dtype: torch.dtype) -> float:
    """Error ratio allowed between two computations that round to `dtype`."""
    # The interpreter truncates to bf16 where the hardware rounds to nearest.
    return {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2 if INTERPRET else 6e-3}[dtype]


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor, float], None]:
    """Compare by the ratio ||got - want|| / ||want||; NaN, Inf and other dtypes or shapes never pass."""

    def check(got: Tensor, want: Tensor, ratio: float) -> None:
        assert got.shape == want.shape
        assert got.isfinite().all()
        got, want = got.double(), want.double()
        error = (got - want).norm() / want.norm().clamp(min=1e-9)
        assert error <= ratio, f"error ratio {error:.2e} exceeds {ratio:.0e}"

    return check


@pytest.fixture
def descriptors() -> None:
    """Triton before 3.4 has no tensor descriptors, and the kernels that use them are left to the library there."""
    from fastdllm.kernels.device import TensorDescriptor

    if TensorDescriptor is None:
        pytest.skip("this Triton has no tensor descriptors")


@pytest.fixture
def scalar_masks() -> None:
    """The interpreter of Triton 3.2 takes a scalar mask that is false for none at all, and stores; its compiler does not."""
    if not INTERPRET:
        return
    from triton.language import semantic

    if hasattr(semantic, "_store_legacy") and "if not mask:" in inspect.getsource(semantic._store_legacy):
        pytest.skip("this Triton's interpreter stores in spite of a scalar mask")


@pytest.fixture
def hopper_card() -> torch.device:
    """A Hopper card, with a Triton whose Gluon the kernels know."""
    from fastdllm.kernels.gluon import usable

    device = torch.device("cuda")
    if not torch.cuda.is_available() or not usable(device):
        pytest.skip("needs a Hopper card and a Triton with Gluon")
    return device
