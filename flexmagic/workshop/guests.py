"""Who is in a workshop: places, the tokens that open them, and what each guest has."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexmagic.errors import ClusterError
from flexmagic.workshop.allowance import Use
from flexmagic.workshop.notices import Board

if TYPE_CHECKING:
    from flexmagic.client.activation import Activation
    from flexmagic.client.run import Run
    from flexmagic.client.tenant import Tenant

_NAME = re.compile(r"[\w .-]{1,40}")


class RefusedError(ClusterError):
    """Whoever asks may not: a wrong token, a place that is taken, a request that came before."""


@dataclass(eq=False)
class Guest:
    """One person: the token of the place, the seat of the notebook that sits there, and a world of its own.

    ``number``: of the last request that was heard. ``seen``: when it last asked for more than what is
    on the ``board``, by the gateway's clock. ``under_way``: requests whose answers have not left yet.
    ``values``: bytes that came with versions of hooks.
    """

    name: str
    token: str
    use: Use
    seen: float
    board: Board = field(default_factory=Board)
    seat: str = ""
    number: int = 0
    under_way: int = 0
    tenant: Tenant | None = None
    runs: OrderedDict[int, Run] = field(default_factory=OrderedDict)
    looked: OrderedDict[tuple[Any, ...], Activation] = field(default_factory=OrderedDict)
    jobs: dict[int, Any] = field(default_factory=dict)
    values: dict[tuple[str, int], int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    notice: str = ""
    errors: int = 0
    last_error: str = ""


def hashed(secret: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Guests:
    """All guests by name, and the two kinds of token: one key for all, or a place's own for each.

    ``open_to_all``: the key lets anybody in who has it, up to ``most``, and gives them a place of their
    own; else each place has its token from the beginning. What is asked for comes from any thread.
    """

    def __init__(
        self, most: int, make: Callable[[str, str], Guest], clock: Callable[[], float], *, open_to_all: bool
    ) -> None:
        self._most, self._make, self._clock = most, make, clock
        self._lock = threading.Lock()
        self._guests: dict[str, Guest] = {}
        self._out: set[str] = set()
        self.key = secrets.token_urlsafe(18) if open_to_all else ""
        self.tokens: dict[str, str] = {}
        if not open_to_all:
            for n in range(1, most + 1):
                self.tokens[f"guest{n}"] = token = secrets.token_urlsafe(18)
                self._guests[f"guest{n}"] = make(f"guest{n}", hashed(token))

    def join(self, secret: str, name: str) -> tuple[Guest, str, str]:
        """Take a place by the key or by its token: the guest, its seat and, of a new place, its token.

        Whoever sat there before is refused from now on. Raises :class:`RefusedError`.
        """
        with self._lock:
            token = ""
            known = hashed(secret)
            if known in self._out:
                raise RefusedError("You were asked to leave this workshop.")
            guest = next((g for g in self._guests.values() if hmac.compare_digest(g.token, known)), None)
            if guest is None and self.key and hmac.compare_digest(hashed(self.key), known):
                guest, token = self._new(name)
            if guest is None:
                raise RefusedError(
                    "This workshop does not know that token. Ask its owner for the line to join."
                )
            guest.seat, guest.number, guest.seen = secrets.token_urlsafe(18), 0, self._clock()
            return guest, guest.seat, token

    def _new(self, name: str) -> tuple[Guest, str]:
        if len(self._guests) >= self._most:
            raise RefusedError(f"The workshop is full: it has {self._most} places.")
        if not _NAME.fullmatch(name):
            raise RefusedError("A guest's name has 1 to 40 letters, digits, blanks, dots or dashes.")
        free = (f"{name}{n if n > 1 else ''}" for n in range(1, self._most + 2))
        name = next(one for one in free if one not in self._guests)
        token = secrets.token_urlsafe(18)
        self._guests[name] = guest = self._make(name, hashed(token))
        return guest, token

    def seated(self, seat: str) -> Guest:
        """The guest of a seat; raises :class:`RefusedError`."""
        with self._lock:
            for guest in self._guests.values():
                if guest.seat and hmac.compare_digest(guest.seat, seat):
                    return guest
        raise RefusedError(
            "This notebook has no place in the workshop: another one took it with the same token, "
            "or the workshop was opened anew. Type %flexcluster join again."
        )

    def heard(self, guest: Guest, number: object) -> None:
        """Note a request's number; raises :class:`RefusedError` for none, or one that was heard before."""
        with self._lock:
            if type(number) is not int or number <= guest.number:
                raise RefusedError("This request was heard before: it is not done twice.")
            guest.number = number

    def out(self, name: str) -> Guest:
        """Take a guest's place away for good; raises :class:`ClusterError` for an unknown name."""
        with self._lock:
            guest = self._guests.pop(name, None)
            if guest is None:
                there = ", ".join(self._guests) or "nobody"
                raise ClusterError(f"There is no guest {name!r}. There are: {there}.")
            self._out.add(guest.token)
            guest.seat = ""
            return guest

    def __iter__(self) -> Iterator[Guest]:
        """All guests, those who have not come yet too."""
        with self._lock:
            return iter(list(self._guests.values()))
