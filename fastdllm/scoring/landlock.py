# SPDX-License-Identifier: Apache-2.0
"""Landlock: which paths a process may read and write, where it may not mount (Linux 5.13; linux/landlock.h)."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from . import kernel

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION_ONLY, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE_SINCE, _SCOPES_SINCE = 3, 6
# Rights over files that each version knows; before the third, files could be truncated unseen.
_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
_SCOPES = 3  # abstract sockets and signals stay inside


def restrict(shown: Iterable[str], hidden: Iterable[str], workspace: str) -> None:
    """Leave this process, and all it starts, reading of `shown` without `hidden`, and everything in `workspace`.

    Raises OSError where the kernel has no Landlock, or one that cannot refuse every kind of writing.
    """
    version = kernel.syscall(_CREATE, None, 0, _VERSION_ONLY)
    if version < _TRUNCATE_SINCE:
        raise OSError(f"Landlock's version is {version}, below {_TRUNCATE_SINCE}")
    rights = _RIGHTS[min(version, max(_RIGHTS))]
    attributes = struct.pack("QQQ", rights, 0, _SCOPES if version >= _SCOPES_SINCE else 0)
    rules = kernel.syscall(_CREATE, attributes, len(attributes) if version >= _SCOPES_SINCE else 8, 0)
    closed = {os.path.realpath(path) for path in hidden}
    for path in shown:
        _show(rules, os.path.realpath(path), closed)
    _allow(rules, workspace, rights)
    kernel.forbid_new_privileges()
    kernel.syscall(_RESTRICT, rules, 0)
    os.close(rules)


def _show(rules: int, path: str, closed: set[str]) -> None:
    """Let `path` be read; a folder that holds a closed one, entry by entry, since a rule covers all below it."""
    if path in closed:
        return
    if any(one.startswith(f"{path}/") for one in closed):
        _allow(rules, path, _READ_DIR)
        for entry in os.scandir(path):
            _show(rules, entry.path, closed)
        return
    mode = os.stat(path).st_mode if os.path.exists(path) else 0
    if stat.S_ISDIR(mode):
        _allow(rules, path, _EXECUTE | _READ_FILE | _READ_DIR)
    elif stat.S_ISREG(mode):
        _allow(rules, path, _EXECUTE | _READ_FILE)
    elif stat.S_ISCHR(mode):
        _allow(rules, path, _WRITE_FILE | _READ_FILE)


def _allow(rules: int, path: str, rights: int) -> None:
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", rights, folder)
        kernel.syscall(_ADD, rules, _PATH_BENEATH, ctypes.c_char_p(rule), 0)
    finally:
        os.close(folder)
