"""Deciding, from looks at the ranks, that a call can no longer end well. Pure: no cluster is asked here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexmagic.engine.watch import Whereabouts

STILL = 1.0
"""Seconds without any step, any byte and any CPU time after which waiting ranks wait in vain."""

SETTLED = 0.3
"""The same on one host once a rank has ended its part, so that it will send nothing more."""

SILENT = 3.0
"""Seconds after which a rank that does not even say where it is counts as frozen."""

SILENT_AT_FIRST = 60.0
"""The same while libraries and weights are read from disk, during which the interpreter may be held."""

LOOKS = 3
"""How many looks in a row must have shown the same."""


@dataclass(frozen=True)
class TimeLimits:
    """What a call may take, in seconds.

    ``run``: all of it, ``None`` for no limit. ``alone``: user code on some ranks while the others
    have ended or wait for them. ``code``: user code at one site, also on all ranks at once, ``None`` for
    no limit.
    """

    run: float | None = None
    code: float | None = None
    alone: float = 10.0


@dataclass(frozen=True)
class Verdict:
    """Why a call is to be ended: ``reason``, as a sentence, and where the ranks were.

    ``guilty``: the ranks that the others wait for in vain, where it can be told.
    """

    reason: str
    places: Mapping[int, Whereabouts | None]
    answered: frozenset[int]
    guilty: tuple[int, ...] = ()

    def __str__(self) -> str:
        """The reason, and a line for every rank."""
        return self._listed(self.reason, {*self.places, *self.answered})

    @property
    def meanwhile(self) -> str:
        """Where the ranks were that had not answered, where the reason is told otherwise."""
        return self._listed("Meanwhile:", self.places)

    def _listed(self, head: str, ranks: Collection[int]) -> str:
        return "\n".join([head, *(f"  rank {rank}: {self._said(rank)}" for rank in sorted(ranks))])

    def _said(self, rank: int) -> str:
        if rank in self.answered:
            return "has ended its part"
        place = self.places[rank]
        if place is None:
            return "does not answer (stopped, or in code that never lets go of the interpreter)"
        text = f"\n      {place.text.strip()}" if place.text.strip() else ""
        return f"{place}{text}"


@dataclass(frozen=True)
class _Stillness:
    """The first of some looks at a rank that all showed the same, when that was, and how many there were."""

    place: Whereabouts | None
    begun: float
    looks: int = 1

    def lasts(self, place: Whereabouts | None) -> bool:
        """Whether a new look shows the same."""
        if place is None or self.place is None:
            return place is self.place
        return place.as_at(self.place)


class Watcher:
    """Looks at one call, again and again, until it has ended or cannot end any more.

    ``settled``: seconds of stillness that are enough once a rank has answered.
    """

    def __init__(self, limits: TimeLimits, silent: float = SILENT, settled: float = STILL) -> None:
        self._limits = limits
        self._silent = silent
        self._settled = settled
        self._answered: frozenset[int] = frozenset()
        self._since: dict[int, _Stillness] = {}
        self._in_code: dict[int, tuple[Any, float]] = {}

    def see(
        self, now: float, answered: Collection[int], places: Mapping[int, Whereabouts | None]
    ) -> Verdict | None:
        """One look at the ranks that have not answered, ``now`` seconds after the call began."""
        done = frozenset(answered)
        if done != self._answered:  # an answer may be here before who waited for that rank has woken up
            self._answered = done
            self._since.clear()
        for rank, place in places.items():
            self._note(rank, place, now)
        if self._limits.run is not None and now > self._limits.run:
            return Verdict(f"The call took longer than its limit of {self._limits.run:g} s.", places, done)
        if self._limits.code is not None:
            looping = tuple(r for r, p in places.items() if self._in_user_code(r, p, now) > self._limits.code)
            if looping:
                who = "every rank" if len(looping) == len(places) else f"rank {', '.join(map(str, looping))}"
                passed = f"{self._limits.code:g} s: a loop without end?"
                return Verdict(
                    f"User code on {who} has been at one place for over {passed}", places, done, looping
                )
        blocked = {r for r, p in places.items() if p is not None and p.blocked and self._still(r, now)}
        rest = set(places) - blocked
        if not rest:
            return Verdict("The ranks wait for each other in vain.", places, done)
        if not blocked and not answered:
            return None
        silent = {r for r in rest if places[r] is None and now - self._since[r].begun > self._silent}
        alone = {r for r in rest if self._too_long(r, places[r], now)}
        if rest == silent | alone:
            who = ", ".join(map(str, sorted(rest)))
            what = "does not answer" if silent else f"has been in user code for over {self._limits.alone:g} s"
            return Verdict(f"The other ranks wait for rank {who}, which {what}.", places, done, tuple(rest))
        return None

    def _note(self, rank: int, place: Whereabouts | None, now: float) -> None:
        seen = self._since.get(rank)
        if seen is not None and seen.lasts(place):
            self._since[rank] = replace(seen, looks=seen.looks + 1)
        else:
            self._since[rank] = _Stillness(place, now)
        if place is None:  # says nothing now, which is no sign of having gone on
            return
        code = (place.kind, place.site, place.hook)
        if self._in_code.get(rank, (None, 0.0))[0] != code:
            self._in_code[rank] = (code, now)

    def _still(self, rank: int, now: float) -> bool:
        seen = self._since[rank]
        return seen.looks >= LOOKS and now - seen.begun >= (self._settled if self._answered else STILL)

    def _in_user_code(self, rank: int, place: Whereabouts | None, now: float) -> float:
        """Seconds for which a rank has been in user code at one site."""
        return now - self._in_code[rank][1] if place is not None and place.kind == "user code" else 0.0

    def _too_long(self, rank: int, place: Whereabouts | None, now: float) -> bool:
        if place is None or place.kind not in {"user code", "other code"}:
            return False
        return now - self._in_code[rank][1] > self._limits.alone
