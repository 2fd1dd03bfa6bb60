# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, whenever the process is killed: written under another name, and then put in place.

Everything that the project writes at once goes through here; what it appends to line by line does not.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_DESCRIPTORS = ("/dev/fd/", "/dev/stdout", "/dev/stderr", "/proc/self/fd/")  # names of what a process has open


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name for a new file, which takes the place of `path` at the end, and is gone after an exception.

    It lies beside the file that `path` names or links to, and ends alike; its rights are those of the file it replaces. A
    device or a pipe is written to itself. OSError, naming `path`, where no file can be made.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if path.is_file() and str(path.absolute()).startswith(_DESCRIPTORS):
        raise OSError(errno.EBUSY, "the file behind it is open, and would be written to twice; give its own name", str(path))
    if path.exists() and not path.is_file():  # of a pipe that is open the real path is none
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        yield path
        return
    partial = _beside(target)
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:  # of a name that nobody gave
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
        try:
            os.replace(partial, target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            shutil.copyfile(partial, target)  # a file that a container has as a mount of its own cannot be replaced
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`text` in UTF-8 as the contents of `path`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """An empty folder inside `folder`, which is made if it is missing. Its files move to `folder` at the end, each over the
    one that has its name there; after an exception they are gone."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = _beside(folder / "partial")
    partial.mkdir()
    try:
        yield partial
        for path in sorted(path for path in partial.rglob("*") if not path.is_dir()):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        with suppress(OSError):
            shutil.rmtree(partial)


def _beside(target: Path) -> Path:
    stem = target.stem.lstrip(".")[:40]  # a name as long as names may be has no room for more
    return target.with_name(f".{stem}.{secrets.token_hex(4)}{target.suffix[:20]}")
