"""How fast something goes on, and how long the rest of it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexmagic.client.waiting import Waited

STEADY = 1.0
"""Seconds after which a pace can be told."""


@dataclass
class _Course:
    """What one rank has done since it began with something."""

    what: str
    total: int
    begun: float
    first: int
    done: int

    def left(self, now: float) -> tuple[float, float] | None:
        """Seconds that the rest will take, and parts done in one; ``None`` before that can be told."""
        passed = now - self.begun
        if passed < STEADY or self.done <= self.first:
            return None
        rate = (self.done - self.first) / passed
        return (self.total - self.done) / rate, rate


class Pace:
    """Looks again and again at how far ranks are; the one that will take longest counts."""

    def __init__(self) -> None:
        self._courses: dict[int, _Course] = {}
        self._now = 0.0

    def see(self, now: float, far: Mapping[int, tuple[str, int, int]]) -> None:
        """One look, ``now`` seconds after the beginning: what, done, and out of how many, by rank."""
        self._now = now
        courses = {}
        for rank, (what, done, total) in far.items():
            course = self._courses.get(rank)
            if course is None or (course.what, course.total) != (what, total) or done < course.done:
                course = _Course(what, total, now, done, done)
            course.done = done
            courses[rank] = course
        self._courses = courses

    def __str__(self) -> str:
        """``4.1/s, 7 s left``; nothing before it can be told."""
        told = [course.left(self._now) for course in self._courses.values()]
        if not told or None in told:
            return ""
        left, rate = max(one for one in told if one is not None)
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        return f"{speed}, {span(left)} left"


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

    def count(self, more: int) -> None:
        """Some more have ended."""
        self.done = min(self.done + more, self._total)

    @property
    def heard(self) -> Callable[[Waited], None] | None:
        """What a call is given as its progress."""
        return None if self._progress is None else self._hear

    def _hear(self, waited: Waited) -> None:
        assert self._progress is not None  # else nobody hears
        far = {0: (self._what, self.done, self._total)}
        self._pace.see(time.perf_counter() - self._started, far)
        self._progress(replace(waited, ranks=far, bars={}, pace=str(self._pace)))
