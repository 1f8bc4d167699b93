"""Waiting for answers of ranks, and seeing to it that waiting always ends."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexmagic.client import engine_side
from flexmagic.client.ranks import Ranks
from flexmagic.client.recovery import Freed, free
from flexmagic.client.watching import SETTLED, SILENT, STILL, TimeLimits, Verdict, Watcher
from flexmagic.errors import FlexError

GRACE = 5.0
"""Seconds in which what an engine published before its reply has arrived."""

QUIET, EVERY, CLOSELY = 0.2, 0.2, 0.1
"""Seconds before the first look at ranks that have not answered, between looks, and once one has answered."""

LOOK_PATIENCE = 0.5
"""Seconds that a rank gets to say where it is."""


Tokens = tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class Waited:
    """How long a call has taken by now, and how far ranks say they are: what, done, out of how many.

    ``printed``: what the code of ranks has printed by now, of those that have printed for long.
    ``tokens``: the new tokens of a generation's first row, and how likely the model held each, ``None``
    where that is not known.
    """

    seconds: float
    ranks: dict[int, tuple[str, int, int]]
    printed: dict[int, str] = field(default_factory=dict)
    tokens: Tokens = ()

    def __str__(self) -> str:
        """``3.2 s: loading weights, rank 0 12/39, rank 1 10/39``."""
        told = [f"rank {rank} {done}/{total}" for rank, (_, done, total) in sorted(self.ranks.items())]
        what = next((what for what, _, _ in self.ranks.values()), "")
        return f"{self.seconds:.1f} s" + (f": {what}, {', '.join(told)}" if told else "")


Progress = Callable[[Waited], None]
"""Called a few times a second while a call is waited for."""

Pending = Mapping[int, Any]
"""Answers that have been asked for, by rank."""


class Waiting:
    """Waits for the ranks' answers under ``limits``."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.limits = TimeLimits()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End what is waited for as an interrupt would; callable from any thread."""
        self._cancelled.set()

    def watch(
        self,
        pending: Pending,
        *,
        progress: Progress | None = None,
        silent: float = SILENT,
        limits: TimeLimits | None = None,
    ) -> Verdict | None:
        """Wait for all answers, or for the certainty that they will not come.

        ``silent``: seconds after which a rank that does not say where it is counts as frozen.
        Raises :class:`KeyboardInterrupt` at an interrupt or :meth:`cancel`, and
        :class:`~flexmagic.errors.EngineError`, the other ranks freed, once an engine has ended.
        """
        self._cancelled.clear()
        started = time.perf_counter()
        watcher, looked = Watcher(limits or self.limits, silent, self._settled), QUIET
        while rest := waiting(pending):
            pending[rest[0]].wait(0.05)
            now = time.perf_counter() - started
            if self._cancelled.is_set():
                raise KeyboardInterrupt
            if gone := sorted(set(self._ranks.ended()) & set(pending)):
                self.free({rank: answer for rank, answer in pending.items() if rank not in gone})
                raise self._ranks.gone_error(gone)
            if progress is not None:
                progress(Waited(now, *_told(pending)))
            if now > looked and (rest := waiting(pending)):
                self._ranks.cluster.check_controller()
                places = self._ranks.control.look(rest, LOOK_PATIENCE)
                verdict = watcher.see(now, [rank for rank in pending if rank not in places], places)
                if verdict is not None and waiting(pending):
                    return verdict
                every = CLOSELY if len(rest) < len(pending) else EVERY
                looked = time.perf_counter() - started + every
        if progress is not None:
            for answer in pending.values():
                if not _failed(answer):
                    answer.wait_for_output(GRACE)  # a reply can overtake what was said before it
            progress(Waited(time.perf_counter() - started, *_told(pending)))
        return None

    @property
    def _settled(self) -> float:
        """Between hosts bytes can be under way, unseen, for longer than on one."""
        return SETTLED if len({seat.host for seat in self._ranks.seats if seat}) == 1 else STILL

    def free(self, pending: Pending) -> Freed:
        """Bring the ranks back that have not answered, ending those that nothing else brings back."""
        return free(self._ranks.control, lambda: waiting(pending), self._ranks.alive(), self._ranks.end)

    def places(self, pending: Pending) -> str:
        """Where every rank was, as text."""
        places = self._ranks.control.look(waiting(pending), LOOK_PATIENCE)
        return str(Verdict("Interrupted.", places, frozenset(set(pending) - set(places))))

    def said(self, pending: Pending) -> dict[int, Any]:
        """What the ranks replied that replied at all."""
        said = {}
        for rank, answer in pending.items():
            with contextlib.suppress(FlexError):
                if answer.ready():
                    said[rank] = self._ranks.value(rank, answer)
        return said


def waiting(pending: Pending) -> list[int]:
    """The ranks that have not answered."""
    return [rank for rank, answer in pending.items() if not answer.ready()]


def _told(pending: Pending) -> tuple[dict[int, tuple[str, int, int]], dict[int, str], Tokens]:
    """What the ranks have said last of how far they are, what they have printed, and tokens they made."""
    told = {rank: answer.data for rank, answer in pending.items()}
    far = {rank: data[engine_side.PROGRESS] for rank, data in told.items() if engine_side.PROGRESS in data}
    printed = {rank: data[engine_side.PRINTED] for rank, data in told.items() if engine_side.PRINTED in data}
    tokens = next((data[engine_side.TOKENS] for data in told.values() if engine_side.TOKENS in data), ())
    return far, printed, tuple(tokens)


def _failed(answer: Any) -> bool:
    try:
        return getattr(answer.get(0), "error", None) is not None
    except Exception:  # noqa: BLE001 - any remote exception counts as a failure
        return True
