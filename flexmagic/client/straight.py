"""Straight lines to engines on this machine: calls that need not go through the controller.

A call takes two processes and one message each way, where the controller's way takes three processes and
four messages. What the call prints and publishes comes over the usual connection, under the call's number.
"""

from __future__ import annotations

import itertools
import pickle
import selectors
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from typing import Any

from flexmagic.client.straight_end import ANSWER, CALL, MOST, PACKET, header

_ROOM = PACKET + ANSWER.size
_NUMBERS = itertools.count(1)


class Straight:
    """The answer to one call; as :class:`~flexmagic.client.mail.Answer`."""

    def __init__(self, client: Any, number: int) -> None:
        self._client = client
        self._id = str(header(client.session.session, number)["msg_id"])
        self.came: Future[tuple[bytes, bool]] = Future()
        self._value: Any = None
        client.metadata[self._id]  # what is published is only heard where something is known of the call
        client._output_futures[self._id] = Future()  # noqa: SLF001 - as for its own calls

    def ready(self) -> bool:
        """Whether it is here."""
        return self.came.done()

    def wait(self, seconds: float) -> None:
        """Wait for it, but not longer."""
        with suppress(NotYet, ConnectionError):
            self.came.result(seconds)

    def get(self) -> Any:
        """The value; raises what the engine raised, or that it ended."""
        if self._value is None:
            self._value = pickle.loads(self.came.result(0)[0])  # noqa: S301 - our own engine's
        if isinstance(self._value, Exception):
            raise self._value
        return self._value

    @property
    def heard(self) -> Mapping[str, Any]:
        """What the engine has published by now: ``data``, ``stdout`` and ``stderr``."""
        heard: Mapping[str, Any] = self._client.metadata[self._id]
        return heard

    def wait_for_output(self, seconds: float) -> None:
        """Wait until all is here that was published, but not longer."""
        if self.came.result(0)[1]:
            with suppress(NotYet):
                self._client._output_futures[self._id].result(seconds)  # noqa: SLF001

    def __del__(self) -> None:
        """Nobody will ask what was published."""
        self._client._output_futures.pop(self._id, None)  # noqa: SLF001
        self._client.metadata.pop(self._id, None)


class Line:
    """The line to one engine; ``stands``: whether calls can be sent on it."""

    def __init__(self, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.socket.connect(f"\0{name}")
        except OSError:
            self.socket.close()
            raise
        self.stands = True
        self._waiting: dict[int, Straight] = {}
        self._parts: list[bytes] = []

    def send(self, client: Any, verb: str, payload: bytes, *, answer: bool) -> Straight | None:
        """Send a call; ``None`` if it cannot be sent now. Without ``answer`` nobody will wait for one.

        A packet goes as a whole or not at all, so that calls of several threads stay whole.
        """
        number = next(_NUMBERS)
        head = f"{client.session.session} {verb}".encode()
        raw = CALL.pack(number if answer else 0, len(head)) + head + payload
        if not self.stands or len(raw) > MOST:
            return None
        pending = Straight(client, number)
        if answer:
            self._waiting[number] = pending
        try:
            self.socket.send(raw, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:  # too much is on its way, or the engine is gone
            self._waiting.pop(number, None)
            return None
        return pending

    def hear(self) -> None:
        """Take a part of an answer that has come, or the end of the line."""
        try:
            raw = self.socket.recv(_ROOM)
        except OSError:
            raw = b""
        if not raw:
            self.end()
            return
        number, more, published = ANSWER.unpack_from(raw)
        self._parts.append(raw[ANSWER.size :])
        if not more:
            answer, self._parts = b"".join(self._parts), []
            if (pending := self._waiting.pop(number, None)) is not None:
                pending.came.set_result((answer, bool(published)))

    def end(self) -> None:
        """Nothing more will come."""
        self.stands = False
        while self._waiting:
            with suppress(KeyError):
                self._waiting.popitem()[1].came.set_exception(ConnectionError("the line has ended"))


class Lines:
    """The lines of a session, by rank; one thread hears them all, for as long as there are any."""

    def __init__(self) -> None:
        self._lines: dict[int, Line] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread: threading.Thread | None = None

    def connect(self, rank: int, name: str) -> None:
        """Take up the line to a rank's engine, if it can be; it replaces one that has ended."""
        try:
            line = Line(name)
        except OSError:  # another machine's name, or another network's
            return
        self._lines[rank] = line
        self._selector.register(line.socket, selectors.EVENT_READ, line)
        if self._thread is None:
            self._thread = threading.Thread(target=self._listen, name="flexmagic lines", daemon=True)
            self._thread.start()
        self._wake.send(b"+")

    def of(self, rank: int) -> Line | None:
        """The line to a rank's engine, if there is one."""
        line = self._lines.get(rank)
        return line if line is not None and line.stands else None

    def close(self) -> None:
        """Hang up."""
        self._lines.clear()
        if self._thread is None:
            self._end()
        with suppress(OSError):  # it was done before
            self._wake.send(b"-")

    def _listen(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    if b"-" in self._woken.recv(64):
                        self._end()
                        return
                    continue
                try:
                    key.data.hear()
                except Exception:  # noqa: BLE001 - whoever waits on another line must hear of its answer
                    key.data.end()
                if not key.data.stands:
                    self._selector.unregister(key.data.socket)
                    key.data.socket.close()

    def _end(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data.end()
                key.data.socket.close()
        self._selector.close()
        self._wake.close()
        self._woken.close()
