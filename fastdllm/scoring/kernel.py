# SPDX-License-Identifier: Apache-2.0
"""The Linux calls that confine a process, for which Python has no names of its own.

Constants are the kernel's (linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h). Standard library only:
`supervisor.py` loads this file by path, without the package around it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
from collections.abc import Iterable
from contextlib import suppress

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET, NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
_PDEATHSIG, _DUMPABLE, _KEEPCAPS, _CHILD_SUBREAPER, _NO_NEW_PRIVS, _CAP_AMBIENT = 1, 4, 8, 36, 38, 47
_AMBIENT_RAISE = 2
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 2, -100, 0x8000, 1, 2
_MOUNT_SETATTR = 442  # the same number on every architecture, as of all calls since Linux 5.1
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPABILITY_VERSION, _CAP_DAC_READ_SEARCH = 0x20080522, 2
# Far from the ids that systems give to people and services; one for each process under test.
_FIRST_UID, _NOBODY = 200_000_000, 65534

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """A function of the C library that returns -1 on an error, which becomes an OSError."""
    result: int = getattr(_libc, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: object) -> int:
    return call("syscall", *(ctypes.c_long(one) if isinstance(one, int) else one for one in (number, *arguments)))


def die_with_parent() -> None:
    call("prctl", _PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def adopt_orphans() -> None:
    """Make processes below this one its children when their own parents end, however they detach themselves."""
    call("prctl", _CHILD_SUBREAPER, 1, 0, 0, 0)


def hide_memory() -> None:
    """Keep other processes of the same user from reading this one's memory, or its children's."""
    call("prctl", _DUMPABLE, 0, 0, 0, 0)


def leave_network() -> None:
    """Give this process and its children an empty network, and a user namespace of their own if that takes one."""
    flags = NEWNET | NEWIPC
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        with suppress(OSError):  # root without its capabilities, in a container say, goes the way of other users
            call("unshare", flags)
            return
    call("unshare", NEWUSER | flags)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def own_process_ids() -> None:
    """Let the next child be the first process of a namespace, which sees no other process and ends with it."""
    call("unshare", NEWPID)


def enter_root(root: str, shown: Iterable[str], hidden: Iterable[str], size: int, inodes: int) -> None:
    """Make the empty folder `root` the whole file system of this process.

    It holds the folders, files and devices `shown` (read-only, at the paths they have now), nothing at the paths
    `hidden`, and the working directory /tmp, empty, of `size` bytes and `inodes` files in memory. There is no /proc.
    """
    call("unshare", NEWNS)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,nr_inodes=4096,mode=0755")
    try:
        _furnish(root, shown, hidden, f"size={size},nr_inodes={inodes},mode=0700")
        os.chdir(root)
        syscall(_PIVOT_ROOT[os.uname().machine], b".", b".")  # the old root now lies on top of the new one
    except (OSError, KeyError):
        call("umount2", root.encode(), _MNT_DETACH)
        raise
    call("umount2", b".", _MNT_DETACH)
    os.chdir("/tmp")


def _furnish(root: str, shown: Iterable[str], hidden: Iterable[str], workspace: str) -> None:
    for name in ("/tmp", "/dev"):
        os.makedirs(root + name, exist_ok=True)
    # First, so that what is shown of /tmp, an environment perhaps, lies on top of it.
    _mount("tmpfs", root + "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, workspace)
    for path in shown:
        _bind(path, root + path)
    for path in hidden:
        _mount("tmpfs", root + path, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4k,nr_inodes=1")
    os.symlink("/tmp", root + "/dev/shm")  # where the C library keeps named semaphores
    _set_attributes(root, _AT_RECURSIVE, _ATTR_RDONLY | _ATTR_NOSUID, 0)
    _set_attributes(root + "/tmp", 0, 0, _ATTR_RDONLY)


def _set_attributes(path: str, flags: int, on: int, off: int) -> None:
    """Of the mount at `path`, and with _AT_RECURSIVE of those below it."""
    attributes = (ctypes.c_uint64 * 4)(on, off, 0, 0)
    syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, ctypes.sizeof(attributes))


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    source_, kind_ = (text and text.encode() for text in (source, kind))
    call("mount", source_, target.encode(), kind_, ctypes.c_ulong(flags), options.encode())


def _bind(source: str, target: str) -> None:
    if stat.S_ISDIR(os.stat(source).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(source, target, None, _MS_BIND | _MS_REC)


def drop_root(number: int, keep_reading: bool) -> bool:
    """Become the unprivileged user `number`; False if that is refused. Process limits bind users, but not root.

    An interpreter in a folder that is closed to other users cannot import there any more. `keep_reading` then keeps
    the right to read all files, for a process that is confined to the right ones by other means; else RuntimeError.
    """
    call("prctl", _KEEPCAPS, 1, 0, 0, 0)
    for uid in (_FIRST_UID + number, _NOBODY):
        try:
            os.chown(".", uid, uid)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            break
        except OSError:
            continue
    else:
        return False
    closed = not os.access(os.__file__, os.R_OK)
    if closed and not keep_reading:
        raise RuntimeError(f"{os.path.dirname(os.__file__)} is closed to other users, and programs do not run as root")
    keep_capabilities(1 << _CAP_DAC_READ_SEARCH if closed else 0)
    if closed:  # of the interpreters that the process starts too: they find their library in the same folder
        call("prctl", _CAP_AMBIENT, _AMBIENT_RAISE, _CAP_DAC_READ_SEARCH, 0, 0)
    return True


def keep_capabilities(kept: int = 0) -> None:
    """Give up all capabilities but the set `kept`, which a program that is started may inherit."""
    call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)(kept, kept, kept, 0, 0, 0))


def forbid_new_privileges() -> None:
    call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)


def limit(kind: int, amount: int) -> None:
    """Lower a resource limit to `amount`, or to what is allowed if that is less."""
    hard = resource.getrlimit(kind)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (amount, amount))
