"""Whether a process is at work, asked so often that to read what the system says of it takes too long."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Any


class Pulse:
    """Of one process, as psutil has it. Where the system can mark its end, to ask is one call of it."""

    def __init__(self, process: Any) -> None:
        self.of = process
        self._mark: int | None = None
        if hasattr(os, "pidfd_open") and lives(process):
            with contextlib.suppress(OSError):  # it has just ended, or an old kernel
                self._mark = os.pidfd_open(process.pid)
            if not lives(process):  # its number may be another's
                self.close()

    @property
    def beats(self) -> bool:
        """Whether the process has not ended; one that is stopped has not."""
        if self._mark is None:
            return lives(self.of)
        poll = select.poll()
        poll.register(self._mark, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Watch it no more so closely."""
        if self._mark is not None:
            os.close(self._mark)
            self._mark = None

    def __del__(self) -> None:
        self.close()


def lives(process: Any) -> bool:
    """Whether a process is at work; one that has ended may still be listed."""
    return status(process) not in {"", "zombie"}


def status(process: Any) -> str:
    """What the system says of a process, as psutil has it; ``""`` if there is none."""
    import psutil

    try:
        return str(process.status()) if process.is_running() else ""
    except psutil.NoSuchProcess:
        return ""
