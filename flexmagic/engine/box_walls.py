"""What keeps code in a box: the system calls it may make, and how much it may take.

The list of calls is one of what is allowed: to compute, to have memory, to read and write what is open
already. Opening, connecting, starting, signalling and everything that is not known is refused by the
kernel (seccomp), from within the process and for good.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from dataclasses import dataclass

ALLOWED = (
    "read", "readv", "write", "writev", "sendto", "recvfrom", "lseek", "close", "fstat", "fcntl",
    "poll", "ppoll",
    "mmap", "munmap", "mprotect", "mremap", "madvise", "brk", "membarrier", "mincore",
    "futex", "futex_waitv", "set_robust_list", "rseq", "sched_yield", "sched_getaffinity", "getcpu",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall",
    "clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time", "times",
    "getrandom", "getpid", "gettid", "getuid", "geteuid", "getgid", "getegid", "getrusage", "sysinfo",
    "uname", "exit", "exit_group",
)  # fmt: skip
"""The system calls that code in a box may make."""

NOBODY = 65534

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 1, 38, 4


@dataclass(frozen=True)
class Room:
    """What one box may take: ``memory`` and ``saved`` in bytes, ``seconds`` for each call.

    ``saved``: of what hooks leave in ``ctx``; ``printed``: characters per call.
    """

    seconds: float = 5.0
    memory: int = 1 << 30
    saved: int = 16 << 20
    printed: int = 20_000


def available() -> str:
    """Why this machine can make no box; ``""`` if it can."""
    if os.uname().sysname != "Linux":
        return "boxes need Linux"
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as error:
        return f"boxes need libseccomp and pyseccomp (pip install flexmagic[workshop]): {error}"
    known = [name for name in ALLOWED if _number(pyseccomp, name) is not None]
    return "" if "read" in known else "libseccomp does not know this machine's system calls"


def _number(library: object, name: str) -> int | None:
    try:
        found: int = library.resolve_syscall(library.Arch.NATIVE, name)  # type: ignore[attr-defined]
    except (RuntimeError, ValueError, OSError):
        return None
    return found if found >= 0 else None


def close_in(room: Room) -> None:
    """Put this process into its box, for good; it must have everything open that it needs.

    Raises :class:`OSError` or :class:`RuntimeError` where the system refuses: then nothing may run here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    for option, value in (
        (_PR_SET_NO_NEW_PRIVS, 1),
        (_PR_SET_DUMPABLE, 0),
        (_PR_SET_PDEATHSIG, signal.SIGKILL),
    ):
        if libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
    for kind, most in (
        (resource.RLIMIT_AS, _address_space() + room.memory),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    _allow_only(ALLOWED)


def _address_space() -> int:
    with open("/proc/self/statm") as statm:  # noqa: PTH123 - a kernel file, read at once
        return int(statm.read().split()[0]) * resource.getpagesize()


def _allow_only(names: tuple[str, ...]) -> None:
    import errno

    import pyseccomp

    walls = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in names:
        if _number(pyseccomp, name) is not None:  # time is a call on some machines only
            walls.add_rule(pyseccomp.ALLOW, name)
    walls.load()
