"""Several small things that different people ask of the ranks at once, in one message to each rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexmagic.client.regroup import merged
from flexmagic.client.turns import Gatherer
from flexmagic.errors import FlexError

if TYPE_CHECKING:
    from flexmagic.client.calls import Calls, Requests

_HERE = threading.local()


@dataclass(eq=False)
class _Asked:
    """What one thread waits for: replies by rank, or the error that kept them from coming."""

    requests: Requests
    done: threading.Event = field(default_factory=threading.Event)
    replies: dict[int, Any] = field(default_factory=dict)
    error: BaseException | None = None


class Gathering:
    """Does several things in threads; what they ask of the ranks goes there together, round by round.

    Only for what no ranks have to meet for, and what needs no turn of its own: a hook's definition, a look
    at a few values.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self._change = threading.Condition()
        self._active = 0
        self._waiting: list[_Asked] = []

    def do(self, works: Sequence[Callable[[], None]]) -> None:
        """Do all of them, each of which handles its own errors."""
        self._active = len(works)
        threads = [Gatherer(target=self._work, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        while round_ := self._round():
            self._ask(round_)
        for thread in threads:
            thread.join()

    def ask(self, requests: Requests) -> dict[int, Any]:
        """As :meth:`Calls.some`, from one of the threads."""
        asked = _Asked(requests)
        with self._change:
            self._waiting.append(asked)
            self._change.notify()
        asked.done.wait()
        if asked.error is not None:
            raise asked.error
        errors = {rank: reply.error for rank, reply in asked.replies.items() if reply.error}
        if errors:
            raise merged(errors)
        return {rank: reply.value for rank, reply in asked.replies.items()}

    def _work(self, work: Callable[[], None]) -> None:
        _HERE.gathering = self
        try:
            work()
        finally:
            with self._change:
                self._active -= 1
                self._change.notify()

    def _round(self) -> list[_Asked]:
        """What all threads that are not over wait for, once they do; nothing when all are over."""
        with self._change:
            self._change.wait_for(lambda: len(self._waiting) == self._active)
            found, self._waiting = self._waiting, []
            return found

    def _can_be_asked(self, one: _Asked) -> bool:
        """Whether all its ranks are there; where not, it alone hears of it."""
        try:
            self.calls.ranks.refuse_if_ended(one.requests)
        except FlexError as error:
            one.error = error
            one.done.set()
        return one.error is None

    def _ask(self, asked: list[_Asked]) -> None:
        """Ask for one round, and wake who waits for it."""
        by_rank: dict[int, list[tuple[str, Any, Any]]] = {}
        asked = [one for one in asked if self._can_be_asked(one)]
        if not asked:
            return
        for one in asked:
            for rank, request in one.requests.items():
                by_rank.setdefault(rank, []).append(request)
        try:
            found = self.calls.some({rank: ("several", (some,), {}) for rank, some in by_rank.items()})
        except BaseException as error:  # noqa: BLE001 - whoever waits hears of it
            for one in asked:
                one.error = error
        else:
            left = {rank: iter(replies) for rank, replies in found.items()}
            for one in asked:
                one.replies = {rank: next(left[rank]) for rank in one.requests}
        for one in asked:
            one.done.set()


def gathering(calls: Calls) -> Gathering | None:
    """What this thread is a part of, if it asks by these calls."""
    found: Gathering | None = getattr(_HERE, "gathering", None)
    return found if found is not None and found.calls is calls else None
