# SPDX-License-Identifier: Apache-2.0
"""Which implementation an op gets, in fresh processes: the choice is made once, at import."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys

import pytest

from fastdllm import kernels

OPS = sorted(name for name in set(kernels.__all__) - {"quantize_weight"} if name.islower())


@pytest.mark.parametrize("name", OPS)
def test_twins_take_the_same_arguments(name: str) -> None:
    """The contract is the reference's docstring, and an op is what `help` shows of it."""
    op = getattr(kernels, name)
    reference = inspect.unwrap(op)
    twin = importlib.import_module(reference.__module__.replace("reference", "triton"))
    assert inspect.signature(getattr(twin, name)) == inspect.signature(reference) == inspect.signature(op)
    assert op.__doc__ == reference.__doc__ and "See" not in op.__doc__.split(".")[0]


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_works_without_triton() -> None:
    """`None` in sys.modules makes every import of triton fail."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastdllm.kernels as k\n"
        "print(k.linear_silu_mul(torch.ones(1, 2), torch.ones(4, 2)).shape)"
    )
    done = python(code, FASTDLLM_KERNELS="auto")
    assert done.stdout == "torch.Size([1, 2])\n", done.stderr


def test_every_name_in_a_kernel_is_one_that_this_triton_has() -> None:
    """Triton looks them all up before it compiles one, those of branches that are not taken as well."""
    code = (
        "import importlib, pathlib, fastdllm.kernels as k\n"
        "from triton.runtime.jit import JITFunction\n"
        "base = pathlib.Path(k.__file__).parent\n"
        "files = [p.relative_to(base).with_suffix('') for p in base.rglob('*.py')]\n"
        "modules = [importlib.import_module('.'.join((k.__name__, *p.parts))) for p in files if p.name != '__init__']\n"
        "found = {f.fn: f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)}\n"
        "print(len({f.cache_key for f in found.values()}))"
    )
    done = python(code, TRITON_INTERPRET="0")
    assert done.returncode == 0 and int(done.stdout) > 20, done.stderr


def test_environment_forces_triton() -> None:
    code = (
        "import sys, torch, fastdllm.kernels as k\n"
        "assert 'triton' not in sys.modules\n"
        "x = torch.randn(2, 64)\n"
        "y, _ = k.rmsnorm(x, torch.ones(64), 1e-6)\n"
        "assert 'fastdllm.kernels.rmsnorm.triton' in sys.modules\n"
        "assert y.pow(2).mean(-1).sub(1).abs().max() < 1e-5"
    )
    done = python(code, FASTDLLM_KERNELS="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_unknown_choice() -> None:
    done = python("import fastdllm.kernels", FASTDLLM_KERNELS="cuda")
    assert "ValueError: FASTDLLM_KERNELS='cuda' is not one of auto, reference, triton" in done.stderr
