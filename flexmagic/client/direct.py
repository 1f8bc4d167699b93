"""Receiving from ranks of other machines what they offer, straight from each into its place in an array."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from flexmagic.engine.outlet import WANTED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic.engine.outlet import Offer
    from flexmagic.layout.assemble import Read

AT_ONCE = 4
"""Requests to one rank that are under way at a time."""

ROUTE = 3.0
"""Seconds within which the first answer of a rank has to come; without, there is no route to it."""

SILENCE = 20.0
"""Seconds without any answer after which a route counts as broken."""


@dataclass(frozen=True)
class Wanted:
    """A part of a read, and which bytes of what is offered it is."""

    read: Read
    offer: Offer
    start: int
    nbytes: int


def receive(
    out: NDArray[Any], wanted: Sequence[Wanted], unreachable: set[str], came: Callable[[int], None]
) -> list[Wanted]:
    """Fill slices of an array; returns those that did not come, as there is no route to their rank.

    ``unreachable``: the endpoints of ranks without one, to which such are added, so that nobody waits for one
    twice. ``came`` hears how many bytes have come with each answer.
    """
    by_rank: dict[str, deque[Wanted]] = {}
    for one in wanted:
        by_rank.setdefault(one.offer.endpoint, deque()).append(one)
    poller: Any = zmq.Poller()
    links: dict[Any, _Link] = {}
    try:
        for waiting in by_rank.values():
            link = _Link(waiting)
            links[link.socket] = link
            poller.register(link.socket, zmq.POLLIN)
        while live := [link for link in links.values() if not link.over]:
            ready = set(dict(poller.poll(100)))
            for link in live:
                if link.socket in ready:
                    came(link.take(out))
                elif link.silent:
                    link.over = True
                    unreachable.add(link.endpoint)
    finally:
        for link in links.values():
            link.socket.close(0)
    return [one for link in links.values() for one in link.left]


class _Link:
    """One rank: what is under way from it and what is still to be asked for."""

    def __init__(self, waiting: deque[Wanted]) -> None:
        first = waiting[0].offer
        self.endpoint, self.over = first.endpoint, False
        context: Any = zmq.Context.instance()
        self.socket = context.socket(zmq.DEALER)
        self.socket.curve_publickey, self.socket.curve_secretkey = zmq.curve_keypair()
        self.socket.curve_serverkey = first.key
        self.socket.linger, self.socket.ipv6 = 0, "[" in self.endpoint
        self.socket.connect(self.endpoint)
        self._waiting, self._asked = waiting, deque[Wanted]()
        self._heard, self._patience = time.monotonic(), ROUTE
        self._ask()

    @property
    def left(self) -> list[Wanted]:
        """What has not come."""
        return [*self._asked, *self._waiting]

    @property
    def silent(self) -> bool:
        """Whether nothing has come for too long."""
        return time.monotonic() - self._heard > self._patience

    def _ask(self) -> None:
        while self._waiting and len(self._asked) < AT_ONCE:
            one = self._waiting.popleft()
            self.socket.send_multipart([one.offer.ticket, _request(one)])
            self._asked.append(one)

    def take(self, out: NDArray[Any]) -> int:
        """Put one answer in its place, and ask for more; how many bytes that was."""
        which, frame = self.socket.recv_multipart(copy=False)
        self._heard, self._patience = time.monotonic(), SILENCE
        one = self._asked[0]  # answers come in the order of the requests
        if which.bytes != _request(one) or len(frame.buffer) != one.nbytes:
            self.over = True
            return 0
        self._asked.popleft()
        place = out[one.read.result]
        place[...] = np.frombuffer(frame.buffer, out.dtype).reshape(place.shape)
        self._ask()
        self.over = not self._asked
        return one.nbytes


def _request(one: Wanted) -> bytes:
    return WANTED.pack(one.offer.part, one.start, one.nbytes)
