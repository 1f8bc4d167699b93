"""Times of several ways to do the same work, taken in turn, so that what disturbs one disturbs all."""

from __future__ import annotations

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


def in_turn(ways: Mapping[str, Callable[[], float | None]], rounds: int) -> Times:
    """Seconds of each way in each round; each round goes through them in another order.

    A way that returns seconds says itself how long it took, of which its preparation is no part.
    """
    names = list(ways)
    times: Times = {name: [] for name in names}
    for name in names:  # once unmeasured: caches, lazy imports
        ways[name]()
    for n in range(rounds):
        shifted = names[n % len(names) :] + names[: n % len(names)]
        for name in shifted if n % 2 == 0 else reversed(shifted):
            started = time.perf_counter()
            own = ways[name]()
            times[name].append(time.perf_counter() - started if own is None else own)
    return times


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
    """How much longer one way took than another, round by round."""
    return Spread.of([a / b for a, b in zip(times[one], times[other], strict=True)])


def overhead(times: Times, one: str, other: str, base: str) -> Spread:
    """What one way adds to a base, as a share of what another way adds, by the medians of the rounds.

    The spread is that of the first way's own addition, over the median of the other's.
    """
    added = [a - b for a, b in zip(times[one], times[base], strict=True)]
    others = statistics.median(a - b for a, b in zip(times[other], times[base], strict=True))
    if others <= 0:
        return Spread(float("nan"), float("nan"), float("nan"))
    return Spread.of([a / others for a in added])


def least_overhead(times: Times, one: str, other: str, base: str) -> Spread:
    """As :func:`overhead`, of each way's fastest round: what other work on the machine disturbs least."""
    added = min(times[other]) - min(times[base])
    found = (min(times[one]) - min(times[base])) / added if added > 0 else float("nan")
    return Spread(found, found, found)
