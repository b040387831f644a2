"""The Linux calls that Python 3.11 has no function for. Each raises OSError."""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_NOSUID = 2
MS_NODEV = 4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38

_MOUNT_ATTR_RDONLY = 1
_MOUNT_ATTR_NOSUID = 2
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
# These calls are younger than the split of the tables: the same numbers on every machine.
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x2008_0522

# Rights by the version of Landlock that brought them; executing (0) stays free.
_LANDLOCK_RIGHTS = {1: 0x1FFF & ~1, 2: 1 << 13, 3: 1 << 14}
_LANDLOCK_RULE_PATH_BENEATH = 1
_LANDLOCK_WRITE_FILE, _LANDLOCK_READ_FILE, _LANDLOCK_READ_DIRECTORY = 1 << 1, 1 << 2, 1 << 3

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def unshare(namespaces: int) -> None:
    _checked(_libc.unshare(namespaces), "unshare")


def prctl(option: int, argument: int, pointer: object = 0) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(argument), pointer, 0, 0), f"prctl({option})")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    result = _libc.mount(
        source.encode(),
        target.encode(),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        options.encode(),
    )
    _checked(result, f"mount {target}")


def make_read_only(path: str) -> None:
    """The mount at `path` and all below it. Needs Linux 5.12."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    result = _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, attributes, len(attributes))
    _checked(result, f"mount_setattr {path}")


def drop_capabilities() -> None:
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.syscall(_CAPSET[platform.machine()], header, bytes(24)), "capset")


def forbid_files_except(directory: str, *, readable: Sequence[str], writable: Sequence[str]) -> None:
    """By Landlock, for this process for good: no file is read but below `readable`, which may be files too, and none
    written, made or removed but in `directory`, where all is allowed, and the files `writable`.

    Needs Linux 5.13, and PR_SET_NO_NEW_PRIVS.
    """
    version = _checked(_libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1), "landlock")
    rights = sum(right for since, right in _LANDLOCK_RIGHTS.items() if since <= version)
    attributes = struct.pack("=Q", rights)
    ruleset = _checked(_libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0), "landlock")
    try:
        for path, allowed in (
            (directory, rights),
            *((path, _LANDLOCK_READ_FILE | _LANDLOCK_READ_DIRECTORY) for path in readable if os.path.isdir(path)),
            *((path, _LANDLOCK_READ_FILE) for path in readable if not os.path.isdir(path)),
            *((path, _LANDLOCK_READ_FILE | _LANDLOCK_WRITE_FILE) for path in writable),
        ):
            where = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", allowed, where)
            result = _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)
            os.close(where)
            _checked(result, f"landlock {path}")
        _checked(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock")
    finally:
        os.close(ruleset)
