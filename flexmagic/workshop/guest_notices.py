"""What the owner of a workshop has put up, as a guest has it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flexmagic.client.table import Table
from flexmagic.errors import HookError, SiteError
from flexmagic.workshop.guest_activation import GuestActivation
from flexmagic.workshop.notices import KEPT, Notice

if TYPE_CHECKING:
    from flexmagic.workshop.link import Link


class GuestNotices:
    """Hooks that are offered, tensors that are shown, and what was collected; asked for when read."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._seen = 0
        self._lock = threading.Lock()
        self._known: list[Notice] = []
        self._board = ""

    def all(self) -> list[Notice]:
        """Everything that is up, the oldest first; what is known here already does not travel again."""
        with self._lock:
            return self._read(self._link.ask)

    def glance(self) -> list[Notice]:
        """The same, for a page that asks again and again: holds up nothing; meanwhile, what is known."""
        if not self._lock.acquire(blocking=False):
            return list(self._known)
        try:
            return self._read(self._link.glance)
        finally:
            self._lock.release()

    def _read(self, ask: Callable[..., tuple[dict[str, Any], list[bytes]] | None]) -> list[Notice]:
        last = self._known[-1].number if self._known else 0
        answer = ask("notices", since=last)
        if answer is not None and answer[0]["board"] != self._board:
            self._known.clear()  # the workshop was opened anew, and counts from 1
            self._board, self._seen = answer[0]["board"], 0
            answer = answer if last == 0 else ask("notices", since=0)
        if answer is not None:
            self._known += [Notice.read(given) for given in answer[0]["notices"]]
            del self._known[:-KEPT]
        return list(self._known)

    def new(self) -> list[Notice]:
        """What has come since this was called last; asks only if an answer has said that there is."""
        if self._link.noticed == self._seen:
            return []
        fresh = [notice for notice in self.all() if notice.number > self._seen]
        self._seen = max([self._link.noticed, *(notice.number for notice in fresh)])
        return fresh

    def cell(self, name: str) -> str:
        """The cell of a hook that is offered, the latest of a name; raises :class:`HookError`."""
        offered = {notice.name: notice.cell for notice in self.all() if notice.kind == "hook"}
        if name not in offered:
            raise HookError(f"No hook {name!r} is offered. Offered: {', '.join(offered) or 'none'}.")
        return offered[name]

    def view(self, number: int | None = None) -> GuestActivation:
        """A tensor that the owner shows, the latest or that of a notice; raises :class:`SiteError`."""
        if number is None:
            shown = [notice.number for notice in self.all() if notice.kind == "view"]
            if not shown:
                raise SiteError("The owner shows nothing yet.")
            number = shown[-1]
        return GuestActivation(self._link, {"shown": number})

    def table(self) -> Table:
        """What is up, with what to type to have it."""
        return notice_table(self.all())

    def __repr__(self) -> str:
        """The table as text."""
        return str(self.table())


def notice_table(notices: list[Notice]) -> Table:
    """Notices with what to type next."""
    rows = tuple((str(notice.number), notice.line) for notice in notices)
    return Table(("", "from the owner"), rows, "" if rows else "The owner has sent nothing yet.")
