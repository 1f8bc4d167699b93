"""The engine's end of a straight line: calls of notebooks on the same machine, past the controller.

Calls run in the main thread, one after the other and never within a cell, as those do that come through
the controller. Only processes of the same user are listened to.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import secrets
import socket
import struct
import sys
from typing import Any

CALL = struct.Struct("<QH")
"""Before a call: its number, 0 if nobody waits for an answer; how long the name of the verb is."""

ANSWER = struct.Struct("<QBB")
"""Before a part of an answer: the call's number, whether more follows, whether something was published."""

PACKET, PATIENCE = 1 << 16, 10.0
"""Bytes of a part of an answer, and seconds in which a notebook has to take it."""

MOST = 1 << 17
"""Bytes of the longest call."""

_CREDENTIALS = struct.Struct("3i")


class End:
    """Where an engine listens; whatever is published during a call names it by its number."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._lock = kernel._main_asyncio_lock  # noqa: SLF001 - what keeps its cells from each other
        self._loop = asyncio.get_running_loop()
        self.name = f"flexmagic-{secrets.token_hex(16)}"
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.bind(f"\0{self.name}")  # a name in memory: no file is left behind
        server.listen()
        server.settimeout(0)
        self._loop.add_reader(server, self._accept, server)
        self._server = server

    def close(self) -> None:
        """Listen no more."""
        self._server.close()

    def _accept(self, server: socket.socket) -> None:
        try:
            line, _ = server.accept()
        except OSError:  # whoever it was has gone again
            return
        said = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if _CREDENTIALS.unpack(said)[1] != os.getuid():
            line.close()
            return
        line.settimeout(PATIENCE)
        self._loop.add_reader(line, self._hear, line)

    def _hear(self, line: socket.socket) -> None:
        """Take a call, but not while a cell that waits for something has the engine."""
        if not self._lock.locked():
            self._take(line)
            return
        self._loop.remove_reader(line)

        async def later() -> None:
            async with self._lock:
                if self._take(line):
                    self._loop.add_reader(line, self._hear, line)

        _ = self._loop.create_task(later(), name=f"{self.name} waits")

    def _take(self, line: socket.socket) -> bool:
        """Work on one call; whether the line still stands."""
        try:
            raw = line.recv(MOST)
            if raw:
                self._work(line, raw)
                return True
        except OSError:  # the notebook is gone, or does not take what it asked for
            pass
        self._loop.remove_reader(line)
        line.close()
        return False

    def _work(self, line: socket.socket, raw: bytes) -> None:
        from flexmagic.client import engine_side

        number, size = CALL.unpack_from(raw)
        start = CALL.size + size
        session, verb = raw[CALL.size : start].decode().split()
        kernel, before = self._kernel, self._kernel.session.message_count
        parent = header(session, number)
        kernel.set_parent([], {"header": parent, "parent_header": {}, "metadata": {}, "content": {}})
        kernel.pre_handler_hook()  # from here to its counterpart an interrupt is raised
        try:
            try:
                reply: Any = engine_side.call(verb, raw[start:])
            except BaseException as error:  # noqa: BLE001 - whoever asks must hear of anything
                reply = RuntimeError(f"{type(error).__name__}: {error}")
            answer = _packed(reply) if number else b""
        except BaseException as error:  # noqa: BLE001 - a late interrupt, or a reply that cannot travel
            answer = _packed(RuntimeError(f"{type(error).__name__}: {error}")) if number else b""
        finally:
            kernel.post_handler_hook()
        for stream in (sys.stdout, sys.stderr):
            if getattr(stream, "_flush_pending", True):  # to flush takes two changes of threads
                stream.flush()
        published = kernel.session.message_count != before
        if published:
            kernel._publish_status("idle", "shell", parent={"header": parent})  # noqa: SLF001 - as of other calls
        for at in range(0, len(answer), PACKET):
            part = answer[at : at + PACKET]
            line.sendall(ANSWER.pack(number, at + PACKET < len(answer), published) + part)


def header(session: str, number: int) -> dict[str, Any]:
    """What stands for a call where messages name what they belong to."""
    return {
        "msg_id": f"{session}_straight_{number}",
        "msg_type": "apply_request",
        "session": session,
        "username": "",
        "date": "",
        "version": "5.3",
    }


def _packed(reply: Any) -> bytes:
    """A reply as it travels; what plain pickle cannot take, as what classes of a cell are made of."""
    try:
        return pickle.dumps(reply, pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 - any class may define any __reduce__
        import cloudpickle

        raw: bytes = cloudpickle.dumps(reply)
        return raw
