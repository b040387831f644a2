"""A process with nothing but its memory, its time, a temporary directory and the files of Python.

Two ways: `Isolation.NAMESPACES` gives it a file system of its own (read-only, without the user's files), a process
table and a network of its own; `Isolation.LANDLOCK`, where a container permits no namespaces, lets it see which files
there are, but read none of the user's and write none. Both drop all privileges, set limits, and filter system calls.
"""

import contextlib
import os
import resource
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from rayllm.eval.sandbox import seccomp, syscalls

_NAMESPACES = (
    syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS
)
_NOBODY = 65534
_MAX_FILE = (1 << 31) - 1
_READABLE_DEVICES = ("/dev/zero", "/dev/urandom")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_WORK_DIRECTORY = "/tmp"


class Isolation(StrEnum):
    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one program. Processor time decides, so that a busy machine changes no verdict; the clock ends what sleeps."""

    cpu_s: int = 3  # lm-eval gives 3 s by the clock
    wall_s: float = 10.0
    memory_bytes: int = 1 << 30  # of address space
    file_bytes: int = 1 << 24  # of one file, and of all in the temporary directory
    processes: int = 32  # threads: processes of its own it has none
    open_files: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Jail:
    isolation: Isolation
    limits: Limits
    directory: str  # empty, and nobody else's; becomes the root, or the only place to write
    readable: tuple[str, ...]  # directories that Python needs, absolute
    spare_user: int  # whom root becomes: nobody else, so that a limit on processes counts its own alone

    def unshare(self) -> None:
        """In the parent of the process to be confined: what it forks next is the first of a new process table."""
        if self.isolation is Isolation.LANDLOCK:
            return
        user, group = os.geteuid(), os.getegid()
        if user == 0:
            syscalls.unshare(_NAMESPACES)
            return
        syscalls.unshare(_NAMESPACES | syscalls.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{_NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{_NOBODY} {group} 1")

    def confine(self, keep: Sequence[int]) -> None:
        """Confines this process for good; of its open files it keeps `keep`. OSError where the kernel permits less."""
        if self.isolation is Isolation.NAMESPACES:
            self._enter_root()
        else:
            os.chdir(self.directory)
        self._set_limits()
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        self._become_nobody()
        self._limit_threads()
        if self.isolation is Isolation.LANDLOCK:
            syscalls.forbid_files_except(
                self.directory,
                readable=(*_outermost([os.path.realpath(path) for path in self.readable]), *_READABLE_DEVICES),
                writable=("/dev/null",),
            )
        syscalls.drop_capabilities()
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # no other process of the user reads its memory
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        seccomp.install()
        _silence(keep)  # last: what goes wrong before is said on stderr

    def _enter_root(self) -> None:
        root = self.directory
        os.umask(0o022)
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", root, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "size=1m,mode=755")
        for path in _outermost(self.readable):
            os.makedirs(root + path, exist_ok=True)
            syscalls.mount(path, root + path, None, syscalls.MS_BIND | syscalls.MS_REC)
        for name in ("/lib", "/lib64", "/bin"):  # symbolic links into /usr on most systems
            if os.path.islink(name) and not os.path.lexists(root + name):
                os.symlink(os.readlink(name), root + name)
        os.mkdir(f"{root}/dev")
        for device in _DEVICES:
            Path(root + device).touch()
            syscalls.mount(device, root + device, None, syscalls.MS_BIND)
        work = root + _WORK_DIRECTORY
        os.makedirs(work, exist_ok=True)
        syscalls.make_read_only(root)
        options = f"size={self.limits.file_bytes},mode=1777"
        syscalls.mount("tmpfs", work, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, options)
        os.chroot(root)
        os.chdir(_WORK_DIRECTORY)

    def _become_nobody(self) -> None:
        """Root does; anybody else already is, or stays who they are."""
        if os.geteuid() != 0:
            return
        os.setgroups([])
        for user in (self.spare_user, _NOBODY):  # some containers know 65536 users only
            with contextlib.suppress(OSError):
                os.setresgid(user, user, user)
                os.setresuid(user, -1, -1)
                if self.isolation is Isolation.NAMESPACES:
                    os.setresuid(user, user, user)
                elif self._may_be_reached():
                    os.chown(self.directory, user, user)
                    os.setresuid(user, user, user)
                # Otherwise Python lies where only root reads. It is read as root's then, without root's privileges;
                # threads are counted by the real user, and no system call makes that root again.
                return
        raise OSError("root cannot become another user here")

    def _may_be_reached(self) -> bool:
        """By the real user: what Python needs, and the directory."""
        needed = [path for path in self.readable if os.path.isdir(path)]
        return os.access(os.path.dirname(self.directory), os.X_OK) and all(
            os.access(path, os.R_OK | os.X_OK) for path in needed
        )

    def _limit_threads(self) -> None:
        """The kernel counts those of a user; in a user namespace, those that the user has in it."""
        running = _threads_of(os.getuid()) if self.isolation is Isolation.LANDLOCK else 0
        _, most = resource.getrlimit(resource.RLIMIT_NPROC)
        limit = running + self.limits.processes
        if most != resource.RLIM_INFINITY:
            limit = min(limit, most)
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))

    def _set_limits(self) -> None:
        limits = self.limits
        for kind, value in (
            (resource.RLIMIT_CPU, limits.cpu_s),
            (resource.RLIMIT_AS, limits.memory_bytes),
            (resource.RLIMIT_FSIZE, limits.file_bytes),
            (resource.RLIMIT_NOFILE, limits.open_files),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (value, value))


def _outermost(paths: Sequence[str]) -> list[str]:
    """Existing directories, without those inside another one."""
    chosen: list[str] = []
    for path in sorted({os.path.abspath(path) for path in paths if os.path.isdir(path) and not os.path.islink(path)}):
        if not any(path == above or path.startswith(f"{above}/") for above in chosen):
            chosen.append(path)
    return chosen


def _threads_of(user: int) -> int:
    """Of the real user, in all processes."""
    threads = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, KeyError):  # it has ended meanwhile
            fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            if int(fields["Uid"].split()[0]) == user:
                threads += int(fields["Threads"])
    return threads


def _silence(keep: Sequence[int]) -> None:
    """Standard input is empty, output goes nowhere, and every other file but `keep` is closed."""
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    start = 3
    for kept in sorted(keep):
        os.closerange(start, kept)
        start = kept + 1
    os.closerange(start, _MAX_FILE)
