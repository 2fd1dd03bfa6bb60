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

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PDEATHSIG, _DUMPABLE, _KEEPCAPS, _CHILD_SUBREAPER, _NO_NEW_PRIVS = 1, 4, 8, 36, 38
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY = 442, -100, 0x8000, 1
_CAPABILITY_VERSION, _CAP_DAC_READ_SEARCH = 0x20080522, 2
# Far from the ids that systems give to people and services; one for each program under test.
_FIRST_UID, _NOBODY = 200_000_000, 65534

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def die_with_parent() -> None:
    _call("prctl", _PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def adopt_orphans() -> None:
    """Make processes below this one its children when their own parents end, however they detach themselves."""
    _call("prctl", _CHILD_SUBREAPER, 1, 0, 0, 0)


def hide_memory() -> None:
    """Keep other processes of the same user from reading this one's memory."""
    _call("prctl", _DUMPABLE, 0, 0, 0, 0)


def leave_network_and_processes() -> None:
    """Give the children of this process an empty network and process ids of their own."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        _call("unshare", NEWNET | NEWIPC | NEWPID)
        return
    _call("unshare", NEWUSER | NEWNET | NEWIPC | NEWPID)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def make_files_read_only(workspace: str, size: int) -> None:
    """Every file system read-only, but for an empty one of `size` bytes in memory at `workspace`."""
    _call("unshare", NEWNS)
    _call("mount", None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY, 0, 0, 0)
    _call(
        "syscall",
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_long(_AT_FDCWD),
        b"/",
        ctypes.c_long(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    _call("mount", b"tmpfs", workspace.encode(), b"tmpfs", flags, f"size={size},mode=0700".encode())
    # Without a fresh /proc the program would see, though not reach, the processes outside.
    _call("mount", b"proc", b"/proc", b"proc", ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC), None)
    os.chdir(workspace)


def drop_root(number: int) -> bool:
    """Become an unprivileged user of its own; False if that is refused. Process limits bind users, but not root.

    If the interpreter's own library lies in a folder closed to other users, the right to read is kept, so that the
    program can import from it; the right to write is not.
    """
    _call("prctl", _KEEPCAPS, 1, 0, 0, 0)
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
    keep = 0 if os.access(os.__file__, os.R_OK) else 1 << _CAP_DAC_READ_SEARCH
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)(keep, keep, 0, 0, 0, 0))
    return True


def drop_capabilities() -> None:
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())


def forbid_new_privileges() -> None:
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)


def limit(kind: int, amount: int) -> None:
    """Lower a resource limit to `amount`, or to what is allowed if that is less."""
    hard = resource.getrlimit(kind)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (amount, amount))
