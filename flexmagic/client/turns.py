"""Notebooks that share a cluster take turns: what one asks of all ranks reaches all ranks in one piece."""

from __future__ import annotations

import contextlib
import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import greenlet

EVERY = 0.02
"""Seconds between two looks at whether it is our turn."""


class Strand(greenlet.greenlet):
    """One thing that is done beside others; what it asks of ranks goes there with theirs, in one turn."""


class Turns:
    """A lock between the processes that use one cluster, and between the threads of each.

    The system gives it back when a process ends, in whatever way. It may be taken again within.
    ``gives_way``: lets all others go first who do not, however many turns of its own come after each other.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wish = path.with_suffix(".wish")
        self.gives_way = False
        self._thread = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def turn(self, meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for our turn, and keep it for the length of the block; ``meanwhile`` is called as long."""
        if isinstance(greenlet.getcurrent(), Strand):  # it has that of who gathers
            raise RuntimeError("What is gathered takes no turn of its own.")  # noqa: TRY004 - no argument is wrong
        with self._thread:
            if self._depth:
                yield
                return
            with self._path.open("a") as lock:
                self._wait(lock.fileno(), meanwhile)
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1

    def forget(self) -> None:
        """Leave no file behind of a cluster that is gone."""
        for path in (self._path, self._wish):
            path.unlink(missing_ok=True)

    def _wait(self, lock: int, meanwhile: Callable[[], None]) -> None:
        """Take the lock once it is free and, of those that give way, once nobody else waits for it."""
        if not self.gives_way and _taken(lock):
            return
        with self._wish.open("a") as wish:
            if not self.gives_way:  # held as long as we wait; several may hold it
                fcntl.flock(wish.fileno(), fcntl.LOCK_SH)
            while (self.gives_way and not _free(wish.fileno())) or not _taken(lock):
                meanwhile()
                time.sleep(EVERY)


def _free(descriptor: int) -> bool:
    """Whether nobody holds a lock."""
    if not _taken(descriptor):
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
