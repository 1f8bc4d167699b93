"""Waiting for answers of ranks, and seeing to it that waiting always ends."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from flexmagic.client import engine_side
from flexmagic.client.mail import Answer
from flexmagic.client.pace import Pace
from flexmagic.client.ranks import Ranks
from flexmagic.client.recovery import Freed, free
from flexmagic.client.straight import Straight
from flexmagic.client.watching import SETTLED, SILENT, STILL, TimeLimits, Verdict, Watcher
from flexmagic.errors import FlexError

if TYPE_CHECKING:
    from flexmagic.client.wire import Arriving

GRACE = 5.0
"""Seconds in which what an engine published before its reply has arrived."""

QUIET, EVERY, CLOSELY = 0.2, 0.2, 0.1
"""Seconds before the first look at ranks that have not answered, between looks, and once one has answered."""

LONG = 1.0
"""Seconds after which a call is worth a word."""

LOOK_PATIENCE = 0.5
"""Seconds that a rank gets to say where it is."""


MOST_RANKS = 4
"""How many ranks are told of one by one: those that are last."""

Far = tuple[str, int, int]
"""What is going on, how many parts of it are done, and out of how many."""

Tokens = tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class Waited:
    """How long a call has taken by now, and how far ranks say they are.

    ``pace``: how many parts are done in a second, and how long the rest will take, as words. ``printed``
    and ``shown``: what the code of ranks has printed and displayed by now, of those that have for long;
    ``aside``: what they have written otherwise. ``bars``: of tqdm's, that code draws. ``turn``: nothing
    was asked yet, since another notebook has its turn. ``tokens``: the new tokens of a generation's first
    row, and how likely the model held each, ``None`` where that is not known.
    """

    seconds: float
    ranks: dict[int, Far]
    printed: dict[int, str] = field(default_factory=dict)
    shown: dict[int, dict[int, Any]] = field(default_factory=dict)
    aside: dict[int, str] = field(default_factory=dict)
    bars: dict[int, Far] = field(default_factory=dict)
    pace: str = ""
    turn: bool = False
    tokens: Tokens = ()

    @property
    def far(self) -> dict[int, Far]:
        """How far ranks are: with what the user's code counts, if it does."""
        return self.bars or self.ranks

    def __str__(self) -> str:
        """``3.2 s: loading weights, rank 0 12/39, rank 1 10/39, 4.1/s, 7 s left``."""
        told = {rank: f"{done}/{total}" for rank, (_, done, total) in sorted(self.far.items())}
        if len(set(told.values())) <= 1:
            told = dict(enumerate(list(told.values())[:1]))
        else:
            last = sorted(self.far, key=lambda rank: self.far[rank][1])[:MOST_RANKS]
            told = {rank: f"rank {rank} {told[rank]}" for rank in sorted(last)}
        what = next((what for what, _, _ in self.far.values()), "")
        said = [what] * bool(what) + [*told.values()] + [self.pace] * bool(self.pace)
        if self.turn:
            said = ["waiting for another notebook's turn to end"]
        return f"{self.seconds:.1f} s" + (f": {', '.join(said)}" if said else "")


Progress = Callable[[Waited], None]
"""Called a few times a second while a call is waited for."""


class Attending(Protocol):
    """Is told of what takes long and has no progress of its own."""

    def working(self, verb: str) -> AbstractContextManager[Progress | None]:
        """For the rest of a call that has taken a second by now."""

    def gathering(self, what: str) -> AbstractContextManager[Arriving | None]:
        """For something large that arrives in parts."""

    def counting(self, what: str, total: int | None) -> AbstractContextManager[Callable[[int], None] | None]:
        """For a loop: the number of its passes that are done."""


Pending = Mapping[int, Answer | Straight]
"""Answers that have been asked for, by rank."""


class Waiting:
    """Waits for the ranks' answers under ``limits``."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.limits = TimeLimits()
        self.attending: Attending | None = None
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End what is waited for as an interrupt would; callable from any thread."""
        self._cancelled.set()

    def for_turn(self, progress: Progress | None) -> Callable[[], None]:
        """What to do again and again while another notebook has its turn; can be cancelled."""
        self._cancelled.clear()
        started = time.perf_counter()

        def meanwhile() -> None:
            if self._cancelled.is_set():
                raise KeyboardInterrupt
            if progress is not None:
                progress(Waited(time.perf_counter() - started, {}, turn=True))

        return meanwhile

    def watch(
        self,
        pending: Pending,
        *,
        progress: Progress | None = None,
        silent: float = SILENT,
        limits: TimeLimits | None = None,
        verb: str = "",
    ) -> Verdict | None:
        """Wait for all answers, or for the certainty that they will not come.

        ``silent``: seconds after which a rank that does not say where it is counts as frozen. ``verb``:
        what :attr:`attending` is told of where nobody else hears of ``progress``.
        Raises :class:`KeyboardInterrupt` at an interrupt or :meth:`cancel`, and
        :class:`~flexmagic.errors.EngineError`, the other ranks freed, once an engine has ended.
        """
        self._cancelled.clear()
        started, pace = time.perf_counter(), Pace()
        watcher, looked = Watcher(limits or self.limits, silent, self._settled), QUIET
        with self._hearing(progress, verb) as hearing:
            while rest := waiting(pending):
                pending[rest[0]].wait(0.05)
                now = time.perf_counter() - started
                self._raise_for(pending)
                if hear := hearing(now):
                    hear(_told(now, pending, pace))
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
            progress(_told(time.perf_counter() - started, pending, pace))
        return None

    def _raise_for(self, pending: Pending) -> None:
        """Raise if the user does not want to wait any more, or a rank is gone; the others are freed then."""
        if self._cancelled.is_set():
            raise KeyboardInterrupt
        if gone := sorted(set(self._ranks.ended()) & set(pending)):
            self.free({rank: answer for rank, answer in pending.items() if rank not in gone})
            raise self._ranks.gone_error(gone)

    @contextlib.contextmanager
    def _hearing(self, progress: Progress | None, verb: str) -> Iterator[Callable[[float], Progress | None]]:
        """Who hears how far a call is after so many seconds: ``progress``, else who attends to long ones."""
        with contextlib.ExitStack() as stack:
            asked, late = progress is not None or not verb, progress

            def hearing(now: float) -> Progress | None:
                nonlocal asked, late
                if not asked and now > LONG and self.attending is not None:
                    asked, late = True, stack.enter_context(self.attending.working(verb))
                return late

            yield hearing

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


def _told(now: float, pending: Pending, pace: Pace) -> Waited:
    """What the ranks have said last of how far they are, and what they have printed."""
    heard = {rank: answer.heard for rank, answer in pending.items()}
    data = {rank: dict(of["data"]) for rank, of in heard.items()}

    def said(key: str) -> dict[int, Any]:
        return {rank: of[key] for rank, of in data.items() if of.get(key) is not None}

    aside = {rank: of["stdout"] + of["stderr"] for rank, of in heard.items()}
    shown = {
        rank: {
            int(key.removeprefix(engine_side.SHOWN)): value
            for key, value in of.items()
            if key.startswith(engine_side.SHOWN)
        }
        for rank, of in data.items()
    }
    far, bars = said(engine_side.PROGRESS), said(engine_side.BAR)
    pace.see(now, bars or far)
    tokens = next(iter(said(engine_side.TOKENS).values()), ())
    printed = said(engine_side.PRINTED)
    return Waited(now, far, printed, shown, aside, bars, str(pace), tokens=tuple(tokens))


def _failed(answer: Answer | Straight) -> bool:
    try:
        return getattr(answer.get(), "error", None) is not None
    except Exception:  # noqa: BLE001 - any remote exception counts as a failure
        return True
