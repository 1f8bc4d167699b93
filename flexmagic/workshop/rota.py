"""Whose turn it is: one guest after the other, each with one thing at a time. Knows no cluster."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

QUEUE = 8
"""How much of one guest may wait."""


class Rota(Generic[T]):
    """What waits, by guest: turns go round, so that who asks for much waits for the others in between."""

    def __init__(self) -> None:
        self._ring: OrderedDict[str, deque[T]] = OrderedDict()

    def add(self, guest: str, job: T) -> bool:
        """Let something of a guest wait; ``False`` if too much of it waits already.

        Who had nothing waiting comes after all that have.
        """
        waiting = self._ring.setdefault(guest, deque())
        if len(waiting) >= QUEUE:
            return False
        waiting.append(job)
        return True

    def take(self) -> tuple[str, T] | None:
        """What is next; its guest then comes last. ``None`` if nothing waits."""
        if not self._ring:
            return None
        guest, waiting = next(iter(self._ring.items()))
        return guest, self._pop(guest, waiting)

    def take_like(self, fits: Callable[[T], bool], most: int) -> list[tuple[str, T]]:
        """What else can be done at once with what was taken: the first of further guests, where it fits."""
        found = [(guest, waiting) for guest, waiting in self._ring.items() if fits(waiting[0])][:most]
        return [(guest, self._pop(guest, waiting)) for guest, waiting in found]

    def _pop(self, guest: str, waiting: deque[T]) -> T:
        job = waiting.popleft()
        if waiting:
            self._ring.move_to_end(guest)
        else:
            del self._ring[guest]
        return job

    def place(self, guest: str, job: T) -> int:
        """How many turns of others and of its own come before; 0 for what is next, or does not wait."""
        mine = self._ring.get(guest, deque[T]())
        if job not in mine:
            return 0
        rounds, order = mine.index(job), list(self._ring)
        before = order.index(guest)
        return sum(
            min(len(waiting), rounds + (at < before)) for at, waiting in enumerate(self._ring.values())
        )

    def drop(self, guest: str) -> list[T]:
        """Forget what waits of a guest; returns it."""
        return list(self._ring.pop(guest, ()))

    def remove(self, guest: str, job: T) -> bool:
        """Forget one thing that waits; ``False`` if it does not wait."""
        mine = self._ring.get(guest, deque[T]())
        if job not in mine:
            return False
        mine.remove(job)
        if not mine:
            del self._ring[guest]
        return True

    def __len__(self) -> int:
        """How much waits."""
        return sum(map(len, self._ring.values()))


def jain(work: list[float]) -> float:
    """Jain's fairness index of what each guest got done: 1 if all got the same, 1/n if one got all.

    Source: Jain, Chiu and Hawe, DEC-TR-301, 1984.
    """
    squares = sum(x * x for x in work)
    return sum(work) ** 2 / (len(work) * squares) if squares else 1.0
