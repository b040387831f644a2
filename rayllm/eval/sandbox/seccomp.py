"""The system calls that tested code may not make: a filter in the kernel that no code can take off again.

It denies (EPERM) what could reach other processes, the network, or the kernel's rarer parts. Starting processes is
denied too, so nothing is ever left over and memory is bounded by one process's limit; threads are allowed.
"""

import ctypes
import platform
import struct
from collections.abc import Iterable

from rayllm.eval.sandbox.syscalls import PR_SET_PDEATHSIG, PR_SET_SECCOMP, prctl

_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x1_0000
_X32 = 0x4000_0000
_AUDIT_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_MACHINES = tuple(_AUDIT_ARCH)

# (x86_64, aarch64); None: the machine has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "prlimit64": (302, 261),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    # another user
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setgroups": (116, 159),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setfsuid": (122, 151),
    "setfsgid": (123, 152),
    # processes of its own
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    # the network, and memory that belongs to no process
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # folders, which could be nested deeper than anything can remove again
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    # files elsewhere: what Landlock does not cover
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "quotactl": (179, 60),
    # the kernel itself
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "personality": (135, 92),
    "syslog": (103, 116),
}
_CLONE3 = 435  # its flags lie in memory, where a filter cannot look: the C library then uses clone
_CLONE = (56, 220)
_DATAGRAMS = tuple(
    kind | flags for kind in (2, 3) for flags in (0, 0o4000, 0o2000000, 0o2004000)
)  # SOCK_RAW is one too
# (call's number by machine, which argument, values denied): who gets a file's signals; the death signal; typed-in
# input; pairs of sockets of which one sends to any other socket of this machine, by its name
_DENIED_VALUES: tuple[tuple[tuple[int, int], int, tuple[int, ...]], ...] = (
    ((72, 25), 1, (8, 10, 15)),  # fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX
    ((16, 29), 1, (0x8901, 0x8902, 0x5412)),  # ioctl: FIOSETOWN, SIOCSPGRP, TIOCSTI
    ((157, 167), 0, (PR_SET_PDEATHSIG,)),  # prctl
    ((53, 199), 1, _DATAGRAMS),  # socketpair
)

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL_PROCESS, _ERRNO, _ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def is_supported() -> bool:
    return platform.system() == "Linux" and platform.machine() in _MACHINES


def install() -> None:
    """For this process for good. Needs PR_SET_NO_NEW_PRIVS. OSError where the kernel has no filters."""
    code = b"".join(_program(_MACHINES.index(platform.machine())))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Filter(len(code) // 8, ctypes.addressof(buffer))
    prctl(PR_SET_SECCOMP, 2, ctypes.byref(program))


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _deny(error: int = _EPERM) -> bytes:
    return _instruction(_RETURN, _ERRNO | error)


def _program(machine: int) -> Iterable[bytes]:
    yield _instruction(_LOAD, _ARCH)
    yield _instruction(_JUMP_EQUAL, _AUDIT_ARCH[_MACHINES[machine]], if_true=1)
    yield _instruction(_RETURN, _KILL_PROCESS)  # the 32-bit calls have other numbers
    yield _instruction(_LOAD, _NUMBER)
    yield _instruction(_JUMP_GREATER_EQUAL, _X32, if_false=1)
    yield _deny()
    for numbers in _DENIED.values():
        number = numbers[machine]
        if number is not None:
            yield _instruction(_JUMP_EQUAL, number, if_false=1)
            yield _deny()
    yield _instruction(_JUMP_EQUAL, _CLONE3, if_false=1)
    yield _deny(_ENOSYS)
    yield _instruction(_JUMP_EQUAL, _CLONE[machine], if_false=4)
    yield _instruction(_LOAD, _ARGUMENTS)
    yield _instruction(_JUMP_ANY_BIT, _CLONE_THREAD, if_true=1)
    yield _deny()
    yield _instruction(_RETURN, _ALLOW)
    for by_machine, argument, values in _DENIED_VALUES:
        yield _instruction(_JUMP_EQUAL, by_machine[machine], if_false=2 * len(values) + 2)
        yield _instruction(_LOAD, _ARGUMENTS + 8 * argument)
        for value in values:
            yield _instruction(_JUMP_EQUAL, value, if_false=1)
            yield _deny()
        yield _instruction(_RETURN, _ALLOW)
    yield _instruction(_RETURN, _ALLOW)
