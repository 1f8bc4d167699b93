"""What a workshop's owner puts up for all guests: hooks offered, tensors shown, what was collected."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.errors import SiteError
from flexmagic.workshop.fields import NAME, TEXT, Fields

if TYPE_CHECKING:
    from flexmagic.client.activation import Activation

KINDS = ("hook", "view", "collect")
"""What a notice is of."""

KEPT, VIEWS = 16, 4
"""How many notices, and how many tensors, are kept for guests who come later."""

SAID = 1000
"""Characters of the longest sentence."""

LATEST = 1 << 40
"""The highest number of a notice."""


@dataclass(frozen=True)
class Notice:
    """One thing that guests are told. ``name``: of a hook, else the site; ``cell``: the hook's."""

    number: int
    kind: str
    name: str
    said: str
    cell: str = ""

    @property
    def header(self) -> dict[str, Any]:
        """As it travels."""
        return {**asdict(self), "cell": self.cell or None}

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Notice:
        """One that came from a gateway, its fields checked; raises :class:`MalformedError`."""
        fields = Fields(given, ())
        made = cls(
            fields.whole("number", 1, LATEST),
            fields.one_of("kind", KINDS),
            fields.text("name", NAME),
            fields.text("said", SAID),
            fields.optional("cell", TEXT) or "",
        )
        fields.done()
        return made

    @property
    def line(self) -> str:
        """What a guest reads, with what to type next."""
        if self.kind == "hook":
            return f"{self.said} To have it as a cell: %flexworkshop take {self.name}"
        if self.kind == "view":
            return f"{self.said} To look: %flexworkshop view {self.number}"
        return self.said


class Board:
    """The last notices, and the tensors that are shown; put up and read from any thread.

    ``name``: another one for each board, by which guests know that a workshop was opened anew.
    """

    def __init__(self) -> None:
        self.name = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._notices: deque[Notice] = deque(maxlen=KEPT)
        self._views: OrderedDict[int, Activation] = OrderedDict()
        self._held: dict[tuple[int, int], Activation] = {}

    def put(self, kind: str, name: str, said: str, cell: str = "", view: Activation | None = None) -> Notice:
        """Put up a notice, with the tensor that it shows; the oldest goes if there are too many."""
        with self._lock:
            notice = Notice(next(self._numbers), kind, name[:NAME], said[:SAID], cell)
            self._notices.append(notice)
            if view is not None:
                self._views[notice.number] = view
                while len(self._views) > VIEWS:
                    gone, _ = self._views.popitem(last=False)
                    self._held = {key: held for key, held in self._held.items() if key[0] != gone}
            return notice

    @property
    def last(self) -> int:
        """The number of the last notice; 0 before the first."""
        with self._lock:
            return self._notices[-1].number if self._notices else 0

    def since(self, number: int) -> list[Notice]:
        """The notices after one."""
        with self._lock:
            return [notice for notice in self._notices if notice.number > number]

    def view(self, number: int, rank: int | None = None) -> Activation:
        """A tensor that is shown, or what one rank holds of it; raises :class:`SiteError`."""
        with self._lock:
            whole = self._views.get(number)
            if whole is None:
                shown = ", ".join(map(str, self._views)) or "nothing"
                raise SiteError(f"Number {number} is not shown any more. Shown now: {shown}.")
            if rank is None:
                return whole
            if (number, rank) not in self._held:
                self._held[number, rank] = whole.held(rank)
            return self._held[number, rank]
