"""One statistic of what guests captured last, by guest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flexmagic.client.table import Table
from flexmagic.errors import FlexError, InputError
from flexmagic.workshop import answers
from flexmagic.workshop import requests as asked

if TYPE_CHECKING:
    from flexmagic.view.source import Stats
    from flexmagic.workshop.guests import Guest

BAR = 24
"""Characters of the longest bar."""


def _square(stats: Stats) -> float:
    """The mean of the squares of the finite values."""
    return stats.mean**2 + stats.std**2


def _finite(stats: Stats) -> int:
    return stats.n - stats.nan - stats.posinf - stats.neginf


STATS: Mapping[str, Callable[[Stats], float]] = MappingProxyType(
    {
        "mean": lambda s: s.mean,
        "std": lambda s: s.std,
        "norm": lambda s: math.sqrt(_finite(s) * _square(s)),
        "rms": lambda s: math.sqrt(_square(s)),
        "min": lambda s: s.min,
        "max": lambda s: s.max,
        "zeros": lambda s: float(s.zeros),
        "nan": lambda s: float(s.nan),
        "n": lambda s: float(s.n),
    }
)
"""What can be collected: of the whole tensor, over its finite values; ``norm`` is the root of the sum of
squares, ``zeros``, ``nan`` and ``n`` are counts."""


@dataclass(frozen=True)
class Found:
    """What one guest's last run has: its number, the value, or why there is none."""

    guest: str
    run: int | None
    value: float | None
    note: str = ""


@dataclass(frozen=True)
class Collected:
    """One statistic at one site, by guest."""

    site: str
    stat: str
    found: tuple[Found, ...]

    @property
    def values(self) -> dict[str, float]:
        """The values of those guests who have one."""
        return {one.guest: one.value for one in self.found if one.value is not None}

    def table(self) -> Table:
        """Guest, run, value, a bar of its size, and why there is none."""
        most = max((abs(v) for v in self.values.values() if math.isfinite(v)), default=0.0)
        rows = []
        for one in self.found:
            finite = one.value is not None and math.isfinite(one.value) and most > 0
            bar = "█" * round(BAR * abs(one.value) / most) if finite and one.value is not None else ""
            number = "" if one.value is None else f"{one.value:.6g}"
            rows.append((one.guest, "" if one.run is None else str(one.run), number, bar, one.note))
        title = f"{self.stat} of {self.site} in the last run of each guest"
        return Table(("guest", "run", self.stat, "", "note"), tuple(rows), title)

    def strip(self) -> Any:
        """The guests' names, coloured by their values; raises :class:`InputError` if nobody has one."""
        from flexmagic.view.forms import strip

        if not self.values:
            raise InputError(f"No guest's last run has captured {self.site}.")
        return strip(list(self.values.values()), list(self.values), title=f"{self.stat} of {self.site}")

    def __str__(self) -> str:
        """The table as text."""
        return str(self.table())

    def __repr__(self) -> str:
        """Statistic, site and how many guests have it."""
        return f"<Collected {self.stat} of {self.site}: {len(self.values)} of {len(self.found)} guests>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001 - IPython's signature
        del cycle
        printer.text(str(self))

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def check(stat: str) -> None:
    """Raise :class:`InputError` for no statistic that can be collected."""
    if stat not in STATS:
        raise InputError(f"There is no statistic {stat!r} to collect. There are: {', '.join(STATS)}.")


def collect(guests: Iterable[Guest], site: str, stat: str) -> Collected:
    """The statistic of every guest who is there; asks the engines, so it is the worker's to do."""
    return Collected(
        site, stat, tuple(_of(guest, site, stat) for guest in guests if guest.tenant is not None)
    )


def _of(guest: Guest, site: str, stat: str) -> Found:
    if not guest.runs:
        return Found(guest.name, None, None, "no run yet")
    number = max(guest.runs)
    try:
        found = answers.activation(guest, asked.Where(number, None, site, None, None))
        value, missing = STATS[stat](found.stats()), found.info.missing_ranks
    except FlexError as error:
        return Found(guest.name, number, None, str(error).partition("\n")[0][:120])
    note = f"without rank {', '.join(map(str, missing))}" if missing else ""
    return Found(guest.name, number, value, note)
