"""Notebooks that share a cluster take turns: what one asks of all ranks reaches all ranks in one piece."""

from __future__ import annotations

import contextlib
import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

EVERY = 0.02
"""Seconds between two looks at whether it is our turn."""


class Turns:
    """A lock between the processes that use one cluster, and between the threads of each.

    The system gives it back when a process ends, in whatever way. It may be taken again within.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def turn(self, meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for our turn, and keep it for the length of the block; ``meanwhile`` is called as long."""
        with self._thread:
            if self._depth:
                yield
                return
            with self._path.open("a") as lock:
                while not _taken(lock.fileno()):
                    meanwhile()
                    time.sleep(EVERY)
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
