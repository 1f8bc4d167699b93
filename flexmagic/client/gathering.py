"""Several small things that different people ask of the ranks at once, in one message to each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import greenlet

from flexmagic.client.regroup import merged
from flexmagic.client.turns import Strand
from flexmagic.errors import FlexError

if TYPE_CHECKING:
    from flexmagic.client.calls import Calls, Requests


@dataclass(eq=False)
class _Asked:
    """What one waits for: replies by rank, or the error that kept them from coming."""

    requests: Requests
    replies: dict[int, Any] = field(default_factory=dict)
    error: BaseException | None = None


class Gathering:
    """Does several things side by side; what they ask of the ranks goes there together, round by round.

    Each goes on until it asks, in a greenlet of this thread. Only for what no ranks have to meet for, and
    what needs no turn of its own: a hook's definition, a look at a few values.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def do(self, works: Sequence[Callable[[], None]]) -> None:
        """Do all of them, each of which handles its own errors."""
        strands = [_Strand(self, work) for work in works]
        while waiting := {strand: asked for strand in strands if (asked := strand.switch()) is not None}:
            self._ask(list(waiting.values()))
            strands = list(waiting)

    def ask(self, requests: Requests) -> dict[int, Any]:
        """As :meth:`Calls.some`, from one of those that go on side by side."""
        asked = _Asked(requests)
        gatherer = greenlet.getcurrent().parent
        assert gatherer is not None  # who did the work
        gatherer.switch(asked)
        if asked.error is not None:
            raise asked.error
        errors = {rank: reply.error for rank, reply in asked.replies.items() if reply.error}
        if errors:
            raise merged(errors)
        return {rank: reply.value for rank, reply in asked.replies.items()}

    def _can_be_asked(self, one: _Asked) -> bool:
        """Whether all its ranks are there; where not, it alone hears of it."""
        try:
            self.calls.ranks.refuse_if_ended(one.requests)
        except FlexError as error:
            one.error = error
        return one.error is None

    def _ask(self, asked: list[_Asked]) -> None:
        """Ask for one round."""
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


class _Strand(Strand):
    """Switched to, it gives what it asks for, or nothing at its end."""

    def __init__(self, of: Gathering, work: Callable[[], None]) -> None:
        super().__init__(work)
        self.of = of


def gathering(calls: Calls) -> Gathering | None:
    """What the code that asks is a part of, if it asks by these calls."""
    strand = greenlet.getcurrent()
    return strand.of if isinstance(strand, _Strand) and strand.of.calls is calls else None
