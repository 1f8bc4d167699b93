"""Times of several ways to do the same work, taken in turn, so that what disturbs one disturbs all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Times = dict[str, list[float]]


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


Ways = Mapping[str, Callable[[], float | None]]
"""What is timed, by name. One that returns seconds says itself how long it took, without preparation."""


def in_turn(ways: Ways, rounds: int, *, warm: bool = True, slow: Slow | None = None) -> Times:
    """Seconds of each way in each round; each round goes through them in another order.

    ``warm``: run each once unmeasured before, for caches and lazy imports. ``slow``: which of them need
    not take part in all rounds.
    """
    names = list(ways)
    times: Times = {name: [] for name in names}
    first = {name: timed(ways[name]) for name in names} if warm else {}
    few = rounds if slow is None else slow.rounds(first, rounds)
    for n in range(rounds):
        taking = names if slow is None or n < few else [name for name in names if name not in slow.names]
        shifted = taking[n % len(taking) :] + taking[: n % len(taking)]
        for name in shifted if n % 2 == 0 else reversed(shifted):
            started = time.perf_counter()
            own = ways[name]()
            times[name].append(time.perf_counter() - started if own is None else own)
    return times


@dataclass(frozen=True)
class Slow:
    """Ways that take part in the first rounds only, in as many as some ``seconds`` for all permit."""

    names: frozenset[str]
    seconds: float
    least: int = 5

    def rounds(self, first: Mapping[str, float], rounds: int) -> int:
        """How many, by what each way took once."""
        theirs = sum(took for name, took in first.items() if name in self.names)
        others = sum(first.values()) - theirs
        if not theirs:
            return rounds
        return max(min(rounds, self.least), min(rounds, int((self.seconds - rounds * others) / theirs)))


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some numbers, one or more."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratio(times: Times, one: str, other: str) -> Spread:
    """How much longer one way took than another, round by round, where both took part."""
    return Spread.of([a / b for a, b in zip(times[one], times[other], strict=False)])


ENDLESS = 1000.0


@dataclass(frozen=True)
class Share:
    """What one way adds to a base, as a share of what another adds; ``undecided``: why that says nothing."""

    value: Spread
    undecided: str = ""


def overhead(times: Times, one: str, other: str, base: str, again: str) -> Share:
    """What one way adds to a base, as a share of what another way adds, round by round.

    ``again``: the base a second time in each round. The mean of the two is what others are compared
    with, and how they differ is the noise: where the other way adds no more than that, nothing can be
    said. A round in which the other way adds nothing counts as one in which we add endlessly more.
    """
    bases = [(a + b) / 2 for a, b in zip(times[base], times[again], strict=True)]
    noise = Spread.of([abs(a - b) / 2 for a, b in zip(times[base], times[again], strict=True)]).high
    ours = [a - b for a, b in zip(times[one], bases, strict=True)]
    others = [a - b for a, b in zip(times[other], bases, strict=True)]
    added = Spread.of(others)
    if added.low <= noise:
        said = f"it adds {_ms(added.median)} ({_ms(added.low)} – {_ms(added.high)}), noise is {_ms(noise)}"
        return Share(Spread(math.nan, math.nan, math.nan), said)
    return Share(Spread.of([a / b if b > 0 else ENDLESS for a, b in zip(ours, others, strict=True)]))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms"
