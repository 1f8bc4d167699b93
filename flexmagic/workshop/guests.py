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

OVER = "This workshop is over: its cluster has ended. To join another, ask its owner."
"""What guests are told of that."""

_NAME = re.compile(r"[\w .-]{1,40}")


class RefusedError(ClusterError):
    """Whoever asks may not: a wrong token, a place that is taken, a request that came before."""


class FormerSeatError(RefusedError):
    """A seat of before the gateway was started again: its notebook may take the place once more."""


class OverError(ClusterError):
    """The workshop's cluster has ended, and the workshop with it."""

    def __init__(self) -> None:
        super().__init__(OVER)


@dataclass(eq=False)
class Guest:
    """One person: the token of the place, the seat of the notebook that sits there, and a world of its own.

    ``token``: its hash. ``number``: of the last request that was heard. ``seen``: when it last asked for more
    than what is on the ``board``, by the gateway's clock. ``former``: the hash of the seat that it had before
    the gateway was started again. ``world``: what its tenant's hooks and runs are known by on the engines,
    empty before there is one; ``held``: how many of them there were when the gateway ended.
    ``under_way``: requests whose answers have not left yet. ``values``: bytes that came with hooks.
    """

    name: str
    token: str
    use: Use
    seen: float
    board: Board = field(default_factory=Board)
    seat: str = ""
    former: str = ""
    number: int = 0
    world: str = ""
    held: int = 0
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

    @property
    def known(self) -> dict[str, Any]:
        """What outlives the gateway, as plain values, without anything that lets anybody in."""
        seat = hashed(self.seat) if self.seat else self.former
        held = self.held if self.tenant is None else len(self.tenant.hooks) + len(self.runs)
        facts = {"name": self.name, "token": self.token, "seat": seat, "world": self.world, "held": held}
        return {**facts, "use": self.use.known, "notice": self.notice, "errors": self.errors}

    def recall(self, known: dict[str, Any]) -> None:
        """Be the guest again of which this was known."""
        self.former, self.world, self.held = known["seat"], known["world"], known["held"]
        self.notice, self.errors = known["notice"], known["errors"]
        self.use.recall(known["use"])


def hashed(secret: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Guests:
    """All guests by name, and the two kinds of token: one key for all, or a place's own for each.

    ``open_to_all``: the key lets anybody in who has it, up to ``most``, and gives them a place of their
    own; else each place has its token from the beginning. ``users``: says whose a token is that is none of
    ours (it may take a while, and raise); who has no place yet is given one under that name. What is asked
    for comes from any thread.
    """

    def __init__(
        self,
        most: int,
        make: Callable[[str, str], Guest],
        clock: Callable[[], float],
        *,
        open_to_all: bool,
        users: Callable[[str], str] | None = None,
    ) -> None:
        self._most, self._make, self._clock = most, make, clock
        self._lock = threading.Lock()
        self._guests: dict[str, Guest] = {}
        self._out: set[str] = set()
        self.key = secrets.token_urlsafe(18) if open_to_all else ""
        self._keys = [hashed(self.key)] if open_to_all else []
        self.tokens: dict[str, str] = {}
        self._users = users
        if not open_to_all and users is None:
            for n in range(1, most + 1):
                self.tokens[f"guest{n}"] = token = secrets.token_urlsafe(18)
                self._guests[f"guest{n}"] = make(f"guest{n}", hashed(token))

    @property
    def known(self) -> dict[str, Any]:
        """What outlives the gateway, as plain values: hashes of all tokens, and each guest."""
        with self._lock:
            guests = [guest.known for guest in self._guests.values()]
            return {"most": self._most, "keys": self._keys, "out": sorted(self._out), "guests": guests}

    def recall(self, known: dict[str, Any]) -> None:
        """Know the guests again that an earlier gateway had, whose tokens let them in as before.

        The key of before lets in new ones too; tokens that were handed out are not known in clear.
        """
        with self._lock:
            self._most, self._out = max(self._most, known["most"]), set(known["out"])
            self._keys += known["keys"]
            if known["guests"] and not known["keys"] and self._users is None:
                self.tokens, self._guests = {}, {}
            for one in known["guests"]:
                self._guests[one["name"]] = guest = self._make(one["name"], one["token"])
                guest.recall(one)

    def join(self, secret: str, name: str) -> tuple[Guest, str, str]:
        """Take a place by the key or by its token: the guest, its seat and, of a new place, its token.

        Whoever sat there before is refused from now on. Raises :class:`RefusedError`.
        """
        user = "" if self._users is None else self._users(secret)
        with self._lock:
            token = ""
            known = hashed(secret)
            if user:
                self._seat_user(user, known)
            if known in self._out:
                raise RefusedError("You were asked to leave this workshop.")
            guest = next((g for g in self._guests.values() if hmac.compare_digest(g.token, known)), None)
            if guest is None and any(hmac.compare_digest(key, known) for key in self._keys):
                guest, token = self._new(name)
            if guest is None:
                raise RefusedError(
                    "This workshop does not know that token. Ask its owner for the line to join."
                )
            guest.seat, guest.number, guest.seen = secrets.token_urlsafe(18), 0, self._clock()
            guest.former = ""
            return guest, guest.seat, token

    def _seat_user(self, user: str, token: str) -> None:
        """See that a user has a place, which the token that was just shown opens."""
        if user in self._out:
            raise RefusedError("You were asked to leave this workshop.")
        if user not in self._guests:
            if len(self._guests) >= self._most:
                raise RefusedError(f"The workshop is full: it has {self._most} places.")
            self._guests[user] = self._make(user, token)
        self._guests[user].token = token

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
            if any(g.former and hmac.compare_digest(g.former, hashed(seat)) for g in self._guests.values()):
                raise FormerSeatError("The gateway was started again: take your place once more.")
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
            self._out.add(guest.token if self._users is None else name)
            guest.seat = ""
            return guest

    def __iter__(self) -> Iterator[Guest]:
        """All guests, those who have not come yet too."""
        with self._lock:
            return iter(list(self._guests.values()))
