"""How fast something goes on, and how long the rest of it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexmagic.client.waiting import Waited

STEADY = 1.0
"""Seconds after which a pace can be told."""


class Pace:
    """Looks again and again at how far ranks are; the one that is behind counts."""

    def __init__(self) -> None:
        self._what: tuple[str, int] | None = None
        self._begun, self._first = 0.0, 0
        self._rate = self._left = 0.0

    def see(self, now: float, far: Mapping[int, tuple[str, int, int]]) -> None:
        """One look, ``now`` seconds after the beginning: what, done, and out of how many, by rank."""
        self._rate = 0.0
        if not far:
            return
        what, done, total = min(far.values(), key=lambda said: said[1] / max(said[2], 1))
        if self._what != (what, total) or done < self._first:
            self._what, self._begun, self._first = (what, total), now, done
        passed = now - self._begun
        if passed >= STEADY and done > self._first:
            self._rate = (done - self._first) / passed
            self._left = (total - done) / self._rate

    def __str__(self) -> str:
        """``4.1/s, 7 s left``; nothing before it can be told."""
        if not self._rate:
            return ""
        speed = f"{self._rate:.1f}/s" if self._rate >= 1 else f"{1 / self._rate:.1f} s each"
        return f"{speed}, {span(self._left)} left"


def span(seconds: float) -> str:
    """``7 s``, ``2 min 5 s`` or ``1 h 2 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Counted:
    """Progress through several calls, of which each tells how far itself is: the number of those done.

    ``done``: to be raised when one has ended. Nobody hears anything if ``progress`` is ``None``.
    """

    def __init__(self, progress: Callable[[Waited], None] | None, what: str, total: int) -> None:
        self._progress = progress
        self._what, self._total = what, total
        self._pace, self._started = Pace(), time.perf_counter()
        self.done = 0

    @property
    def heard(self) -> Callable[[Waited], None] | None:
        """What a call is given as its progress."""
        return None if self._progress is None else self._hear

    def _hear(self, waited: Waited) -> None:
        assert self._progress is not None  # else nobody hears
        far = {0: (self._what, self.done, self._total)}
        self._pace.see(time.perf_counter() - self._started, far)
        self._progress(replace(waited, ranks=far, bars={}, pace=str(self._pace)))
