"""What a guest may take, and what it has taken. Knows no cluster; the clock is given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from flexmagic.errors import InputError

MINUTE = 60.0

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_BYTES = {"captured", "moved"}


class OverLimitError(InputError):
    """A guest asked for more than it may have."""


@dataclass(frozen=True)
class Allowance:
    """What each guest may take.

    ``tokens``: of one run, over all rows, new ones included. ``captured``: bytes that its runs hold on
    all engines together. ``seconds``: of one run. ``moved``: bytes of values that it fetches in a minute.
    ``runs`` and ``requests``: in a minute. ``hooks``: how many it may have.
    """

    tokens: int = 4096
    captured: int = 256 * 10**6
    seconds: float = 30.0
    moved: int = 512 * 10**6
    runs: int = 60
    requests: int = 3000
    hooks: int = 32

    def changed(self, text: str) -> Allowance:
        """The same with what ``"runs=20 captured=64MB"`` says; raises :class:`InputError`."""
        found: dict[str, Any] = {}
        names = [field.name for field in fields(self)]
        for word in text.replace(",", " ").split():
            name, equals, value = word.partition("=")
            if name not in names or not equals:
                raise InputError(f"{word!r} is no limit. Limits: {', '.join(f'{n}=…' for n in names)}.")
            found[name] = _number(name, value)
        whole = {name: value if name == "seconds" else int(value) for name, value in found.items()}
        return replace(self, **whole)

    def __str__(self) -> str:
        """As it is written, and as :meth:`changed` takes it."""
        return " ".join(
            f"{field.name}={_text(field.name, getattr(self, field.name))}" for field in fields(self)
        )


def _text(name: str, value: float) -> str:
    if name not in _BYTES:
        return f"{value:g}" if isinstance(value, float) else str(value)
    unit = max((unit for unit, size in _UNITS.items() if unit and value % size == 0), key=_UNITS.__getitem__)
    return f"{int(value) // _UNITS[unit]}{unit}"


def _number(name: str, text: str) -> float:
    digits = text.rstrip("BKMGbkmg")
    unit = text[len(digits) :].upper()
    try:
        number = float(digits) * _UNITS[unit]
    except (ValueError, KeyError):
        raise InputError(f"{name}={text}: give a number, for bytes with B, KB, MB or GB.") from None
    if not 0 < number < 1e15 or (unit and name not in _BYTES):
        raise InputError(
            f"{name}={text} is no limit: give a number above 0, bytes only for captured and moved."
        )
    return number


class Window:
    """How much happened within the last minute."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: deque[tuple[float, int]] = deque()
        self._sum = 0

    @property
    def total(self) -> int:
        """The sum of it."""
        now = self._clock()
        while self._events and self._events[0][0] <= now - MINUTE:
            self._sum -= self._events.popleft()[1]
        return self._sum

    @property
    def relief(self) -> float:
        """Seconds until some of it is a minute ago."""
        return max(0.0, self._events[0][0] + MINUTE - self._clock()) if self._events else 0.0

    def add(self, amount: int = 1) -> None:
        """Something happened now."""
        self._events.append((self._clock(), amount))
        self._sum += amount


class Use:
    """What one guest takes, held to an allowance at each step."""

    def __init__(self, allowance: Callable[[], Allowance], clock: Callable[[], float]) -> None:
        self._allowance = allowance
        self._runs, self._moved, self._requests = Window(clock), Window(clock), Window(clock)
        self.done = 0
        self.seconds = 0.0
        self.bytes_moved = 0

    @property
    def allowance(self) -> Allowance:
        """What it may be now."""
        return self._allowance()

    @property
    def may_ask(self) -> bool:
        """Whether another request may be made now."""
        return self._requests.total < self.allowance.requests

    @property
    def known(self) -> dict[str, float]:
        """What was taken in all, for a gateway that comes after this one; its minute begins anew."""
        return {"done": self.done, "seconds": round(self.seconds, 3), "bytes_moved": self.bytes_moved}

    def recall(self, known: Mapping[str, float]) -> None:
        """Go on counting from what was taken before."""
        self.done, self.seconds = int(known["done"]), known["seconds"]
        self.bytes_moved = int(known["bytes_moved"])

    def request(self) -> None:
        """Another request; raises :class:`OverLimitError`."""
        most = self.allowance.requests
        if self._requests.total >= most:
            raise OverLimitError(f"You may make {most} requests a minute{_later(self._requests)}")
        self._requests.add()

    def run(self) -> None:
        """Another run; raises :class:`OverLimitError`."""
        most = self.allowance.runs
        if self._runs.total >= most:
            raise OverLimitError(f"You may make {most} runs a minute{_later(self._runs)}")
        self._runs.add()

    def tokens(self, count: int) -> None:
        """A run of so many tokens; raises :class:`OverLimitError`."""
        most = self.allowance.tokens
        if count > most:
            raise OverLimitError(f"This run has {count:,} tokens; you may have {most:,} in one run.")

    def hooks(self, count: int) -> None:
        """So many hooks; raises :class:`OverLimitError`."""
        most = self.allowance.hooks
        if count > most:
            raise OverLimitError(f"You may have {most} hooks: remove one first.")

    def captured(self, nbytes: int) -> None:
        """A run that captures so much; raises :class:`OverLimitError`."""
        most = self.allowance.captured
        if nbytes > most:
            raise OverLimitError(
                f"This run would capture {nbytes:,} bytes; you may hold {most:,}. Capture fewer sites."
            )

    def move(self, nbytes: int) -> None:
        """So many bytes of values; raises :class:`OverLimitError`."""
        most = self.allowance.moved
        if self._moved.total + nbytes > most:
            raise OverLimitError(
                f"You may fetch {most:,} bytes a minute, and this is {nbytes:,} more{_later(self._moved)}"
            )
        self._moved.add(nbytes)
        self.bytes_moved += nbytes

    def finished(self, seconds: float) -> None:
        """A run is over."""
        self.done += 1
        self.seconds += seconds


def _later(window: Window) -> str:
    return f": try again in {window.relief:.0f} s."
