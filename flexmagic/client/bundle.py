"""Small things that are posted to ranks one after the other, in few messages."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

MOST = 64 << 10
"""Bytes of what goes in one message, as far as it is bytes."""

_HERE = threading.local()

Send = Callable[[int, str, Any], None]
"""Posts one verb with its arguments to a rank."""


class Bundle:
    """What one thread posts by some calls; ``send`` posts one message of it."""

    def __init__(self, calls: object, send: Send) -> None:
        self.calls = calls
        self._send = send
        self._held: dict[int, list[tuple[str, Any, dict[str, Any]]]] = {}
        self._sizes: dict[int, int] = {}

    def add(self, rank: int, verb: str, args: tuple[Any, ...]) -> None:
        """Hold one thing back, until there is enough for a message."""
        size = sum(len(arg) for arg in args if isinstance(arg, bytes))
        if self._sizes.get(rank, 0) + size > MOST:
            self._leave(rank)
        self._held.setdefault(rank, []).append((verb, args, {}))
        self._sizes[rank] = self._sizes.get(rank, 0) + size

    def leave(self) -> None:
        """Send what is held."""
        for rank in list(self._held):
            self._leave(rank)

    def _leave(self, rank: int) -> None:
        held, self._sizes[rank] = self._held.pop(rank, []), 0
        if len(held) == 1:
            verb, args, _ = held[0]
            self._send(rank, verb, args)
        elif held:
            self._send(rank, "several", (held,))


@contextlib.contextmanager
def bundle_of(calls: object, send: Send) -> Iterator[None]:
    """In a block, a bundle for what this thread posts by these calls; within another one, that."""
    if bundled(calls) is not None:
        yield
        return
    outer, bundle = getattr(_HERE, "bundle", None), Bundle(calls, send)
    _HERE.bundle = bundle
    try:
        yield
    finally:
        _HERE.bundle = outer
        bundle.leave()


def bundled(calls: object) -> Bundle | None:
    """The bundle that is open in this thread for what is posted by these calls."""
    found: Bundle | None = getattr(_HERE, "bundle", None)
    return found if found is not None and found.calls is calls else None
