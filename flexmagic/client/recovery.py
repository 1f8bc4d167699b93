"""Getting ranks back that wait in vain: free them, end those that cannot be freed, make the groups again."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.client.control import Control
from flexmagic.errors import ClusterError

if TYPE_CHECKING:
    from flexmagic.engine.groups import Meeting
    from flexmagic.engine.private_groups import GroupSpec
    from flexmagic.engine.watch import Whereabouts

AT_ONCE, FREED = 0.1, 0.6
"""Seconds in which ranks that waited for others come back after their connections were shut: most, all."""

AGAIN = 0.3
"""Seconds between interrupts of what goes on."""

STUCK = 3.0
"""Seconds after which a rank that came back neither by that nor by an interrupt is ended."""

PATIENCE = 1.0
"""Seconds that a rank gets to answer on its control channel."""


@dataclass(frozen=True)
class Freed:
    """What it took: the ranks that were interrupted, and those whose process had to be ended."""

    interrupted: tuple[int, ...] = ()
    ended: tuple[int, ...] = ()


def free(
    control: Control,
    waiting: Callable[[], Sequence[int]],
    everyone: Sequence[int],
    end: Callable[[int], None],
) -> Freed:
    """Bring every rank back to where it can be asked again.

    ``waiting``: the ranks that have not come back yet. ``end``: ends one rank's process.
    """
    control.cut(everyone, PATIENCE)
    begun, interrupted = time.perf_counter(), set[int]()
    wait = AT_ONCE
    while not _none(waiting, wait):
        passed, wait = time.perf_counter() - begun, AGAIN
        out = waiting()
        if passed > FREED + STUCK:
            for rank in out:
                end(rank)
            return Freed(tuple(sorted(interrupted - set(out))), tuple(out))
        due = _due(control.look(out, PATIENCE), interrupted, late=passed > FREED)
        control.interrupt(due, PATIENCE)
        interrupted |= set(due)
    return Freed(tuple(sorted(interrupted)))


def _due(places: Mapping[int, Whereabouts | None], interrupted: Collection[int], *, late: bool) -> list[int]:
    """The ranks to interrupt: those in the user's code, which may catch it, again and again, others once.

    One that has yet to begin with what it was asked for is not idle for long.
    """
    return [
        rank
        for rank, place in sorted(places.items())
        if (place is not None and place.kind == "user code")
        or (late and rank not in interrupted and (place is None or place.kind != "idle"))
    ]


def _none(waiting: Callable[[], Sequence[int]], seconds: float) -> bool:
    deadline = time.perf_counter() + seconds
    while waiting():
        if time.perf_counter() > deadline:
            return False
        time.sleep(0.01)
    return True


def together(groups: Sequence[Sequence[GroupSpec]]) -> tuple[GroupSpec, ...]:
    """The groups of all ranks, each once, in the order in which they were made.

    Raises :class:`ClusterError` if ranks have different groups of one name.
    """
    by_name: dict[str, GroupSpec] = {}
    for spec in (spec for of_rank in groups for spec in of_rank):
        if by_name.setdefault(spec.name, spec) != spec:
            msg = f"The ranks do not have the same process group {spec.name}, so it cannot be made again."
            raise ClusterError(msg)
    return tuple(sorted(by_name.values(), key=lambda spec: spec.order))


def meeting_at(host: str, port: int, generations: Mapping[int, int]) -> Meeting:
    """The place of a new generation, after those that the ranks know."""
    from flexmagic.engine.groups import Meeting

    return Meeting(host, port, max(generations.values(), default=0) + 1)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no second interrupt break a recovery; it takes a few seconds at most."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Raise an interrupt of the block at its end, so that what is begun for some ranks is for all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before: Any = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
