"""What user code prints and displays: kept for the run's report, and told meanwhile if the run takes long."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flexmagic.engine.screen import Bar, Bundle, Screen

EVERY = 0.25
"""Seconds between two tellings."""

MOST = 100_000
"""Characters of a run after which nothing more is told before it ends."""

MOST_SHOWN = 32 << 20
"""Bytes of what is displayed in one run; what goes beyond is left out, and a line says so."""


@dataclass(frozen=True)
class Said:
    """All that has been printed so far, in whole lines; what was displayed since; a bar that is drawn."""

    text: str = ""
    new: dict[int, Bundle] = field(default_factory=dict)
    bar: Bar | None = None


Say = Callable[[Said], None]

Displays = Callable[[Callable[[Bundle], None]], contextlib.AbstractContextManager[None]]
"""Sends what is displayed in a block to a function, instead of anywhere else."""


@contextlib.contextmanager
def nowhere(_take: Callable[[Bundle], None]) -> Iterator[None]:
    """Where nothing can be displayed."""
    yield


class Prints:
    """What the code of one run prints on this rank, to either output, or displays."""

    def __init__(self, say: Say = lambda _said: None, displays: Displays = nowhere) -> None:
        self._say = say
        self._displays = displays
        self._before = ""
        self._count = self._nbytes = 0
        self._new: dict[int, Bundle] = {}
        self._told, self._at = Said(), time.monotonic()

    @contextlib.contextmanager
    def taken(self, screen: Screen) -> Iterator[None]:
        """Take what is printed and displayed in a block, on a screen."""

        def write(text: str) -> None:
            screen.write(text)
            self._tell(screen)

        def show(shown: Bundle) -> None:
            self._place(shown, screen)
            self._tell(screen)

        with _STREAM.taking(write):
            try:
                with self._displays(show):
                    yield
            finally:
                self._before += screen.getvalue() if len(self._before) < MOST else ""

    def _place(self, shown: Bundle, screen: Screen) -> None:
        over, self._nbytes = self._nbytes > MOST_SHOWN, self._nbytes + shown.nbytes
        if self._nbytes > MOST_SHOWN:
            screen.write("" if over else f"[over {MOST_SHOWN >> 20} MiB: the rest is not displayed]\n")
            return
        screen.place(self._count, shown)
        self._new[self._count] = shown
        self._count += 1

    def _tell(self, screen: Screen) -> None:
        now = time.monotonic()
        if now - self._at < EVERY or len(self._told.text) > MOST:
            return
        self._at = now
        said = Said(self._before + screen.settled(), self._new, screen.bar())
        if said != self._told:
            self._say(said)
            self._told, self._new = Said(said.text, {}, said.bar), {}


class _Stream(io.TextIOBase):
    """Stands where code writes. One for all runs: code may keep it, as a handler of logging does."""

    def __init__(self) -> None:
        self._takers: list[Callable[[str], Any]] = []

    @contextlib.contextmanager
    def taking(self, write: Callable[[str], Any]) -> Iterator[None]:
        """Let a function have what is written in a block."""
        self._takers.append(write)
        try:
            with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
                yield
        finally:
            self._takers.remove(write)

    def writable(self) -> bool:
        """Anything may be written."""
        return True

    def write(self, text: str) -> int:
        """Hand a text on: to the run that is going on, else to where the process writes."""
        if self._takers:
            self._takers[-1](text)
        elif sys.stderr is not self:
            sys.stderr.write(text)
        return len(text)


_STREAM = _Stream()
