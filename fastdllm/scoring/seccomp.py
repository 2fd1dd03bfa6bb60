# SPDX-License-Identifier: Apache-2.0
"""A list of system calls that a program under test is refused, as a filter that the kernel runs.

Refused is what reaches other programs, or parts of the kernel that computing needs nothing of: sockets, mounts,
namespaces, tracing, keys, modules, clocks, memory files that no limit counts. Numbers are those of the kernel's
tables for x86_64 and aarch64; on another architecture `install` raises OSError. A call newer than these tables
does not exist for the program.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

from . import kernel

_SECCOMP, _FILTER = 22, 2  # prctl
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06  # linux/bpf_common.h
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000  # linux/seccomp.h
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000
_STREAM = 1  # SOCK_STREAM, linux/net.h
_NEWEST = 466  # removexattrat, Linux 6.13
_NAMESPACES = (
    kernel.NEWNS | kernel.NEWCGROUP | kernel.NEWUTS | kernel.NEWIPC | kernel.NEWUSER | kernel.NEWPID | kernel.NEWNET
)

# name: number on x86_64, on aarch64; -1 where there is none
_REFUSED = {
    # other programs, by the network or by files
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "mknod": (133, -1),
    "mknodat": (259, 33),
    "mq_open": (240, 180),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "inotify_init": (253, -1),
    "inotify_init1": (294, 26),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # memory that belongs to no limit
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "vmsplice": (278, 75),  # a page in a pipe keeps all of its huge page, unmapped
    "setsockopt": (54, 208),  # larger buffers of the sockets in a pair
    "userfaultfd": (323, 282),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    # machinery of the kernel
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "lookup_dcookie": (212, 18),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "modify_ldt": (154, -1),
    "uselib": (134, -1),
}
# Modes, owners, times and attributes of files: what Landlock leaves open, and a read-only mount does not.
_FILE_ATTRIBUTES = {
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "lchown": (94, -1),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, -1),
    "utimes": (235, -1),
    "futimesat": (261, -1),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
}
_CLONE, _CLONE3, _SOCKETPAIR = (56, 220), (435, 435), (53, 199)


def install(file_attributes: bool) -> None:
    """Refuse the listed calls to this process and all it starts; `file_attributes` leaves those of files allowed."""
    table = b"".join(struct.pack("HBBI", *line) for line in program(os.uname().machine, file_attributes))
    lines = ctypes.create_string_buffer(table, len(table))
    header = struct.pack("HP", len(table) // 8, ctypes.addressof(lines))
    kernel.forbid_new_privileges()
    kernel.call("prctl", _SECCOMP, _FILTER, ctypes.c_char_p(header), 0, 0)


def program(machine: str, file_attributes: bool) -> list[tuple[int, int, int, int]]:
    """The filter: lines of (code, jump if true, jump if false, operand); a jump skips so many lines."""
    if machine not in _MACHINES or sys.maxsize < 1 << 32:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    column, architecture = _MACHINES[machine]
    refused = {**_REFUSED, **({} if file_attributes else _FILE_ATTRIBUTES)}
    numbers = sorted(one[column] for one in refused.values() if one[column] >= 0)
    deny, missing = (_RETURN, 0, 0, _ERROR | errno.EPERM), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)
    allow = (_RETURN, 0, 0, _ALLOW)
    return [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        deny,
        (_AT_LEAST, 0, 1, _NEWEST + 1),
        missing,
        # Its flags lie in memory, where a filter cannot look; the C library falls back to clone.
        (_EQUAL, 0, 1, _CLONE3[column]),
        missing,
        *(line for number in numbers for line in ((_EQUAL, 0, 1, number), deny)),
        (_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _ARGUMENTS),
        (_ANY_BIT, 0, 1, _NAMESPACES),
        deny,
        allow,
        # A pair of datagram sockets could send to any address.
        (_EQUAL, 0, 4, _SOCKETPAIR[column]),
        (_LOAD, 0, 0, _ARGUMENTS + 8),
        (_AND, 0, 0, 0xF),
        (_EQUAL, 1, 0, _STREAM),
        deny,
        allow,
    ]
