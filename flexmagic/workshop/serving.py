"""The gateway's door: a small web server in a thread, which hears only well-formed requests of its guests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import socket
import ssl
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tornado.httpserver
import tornado.netutil
import tornado.web

from flexmagic.errors import ClusterError, FlexError, InputError
from flexmagic.workshop import certificate
from flexmagic.workshop.address import LOOPBACK, Address
from flexmagic.workshop.allowance import OverLimitError
from flexmagic.workshop.answers import Answer
from flexmagic.workshop.desk import Job
from flexmagic.workshop.frames import HEADER, TYPE, VERSION, MalformedError, pack, unpack
from flexmagic.workshop.gateway import Workshop
from flexmagic.workshop.guests import FormerSeatError, Guest, OverError, RefusedError
from flexmagic.workshop.hub import Hub

STRANGER, GUEST = 4096, 16 << 20
"""Bytes of the longest request of somebody who has no seat, and of a guest."""

PATIENCE = 5.0
"""Seconds for which an answer is waited for before the guest is told to ask again."""

UNREAD = 60.0
"""Seconds after which a reply that nobody reads is thrown away, and its connection broken."""

IDLE = 60.0
"""Seconds after which a connection is broken over which nothing comes; guests connect again unseen."""

AT_ONCE = 8
"""Requests of one guest that may be under way at a time."""

SLOWED = 1.0
"""Seconds for which the answer is held back to a guest who asks for more than may be asked in a minute."""


class _Door(tornado.web.RequestHandler):
    """What all requests have in common: who asks is known before anything that they send is read."""

    def initialize(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self.body = bytearray()
        self.guest: Guest | None = None

    def _begin(self, most: int) -> None:
        """Refuse what is no request of ours, or too long, before its body comes."""
        headers = self.request.headers
        if headers.get("Content-Type") != TYPE or "Origin" in headers:
            self._refuse(415, MalformedError("This is no request of a workshop's guest."))
            return
        length = headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > most:
            self._refuse(413, MalformedError(f"A request has at most {most:,} bytes."))
            return
        connection: Any = self.request.connection
        connection.set_max_body_size(most)

    def _check_over(self) -> None:
        if self.workshop.is_over:
            raise OverError

    def data_received(self, chunk: bytes) -> None:
        self.body += chunk

    def _refuse(self, status: int, error: FlexError) -> None:
        self._note(status, error)
        self.set_header("Connection", "close")
        self._answer(error_header(error), [], status)

    def _note(self, status: int, error: FlexError) -> None:
        """Write down a refusal, for the owner."""
        who = self.guest.name if self.guest is not None else f"stranger at {self.request.remote_ip}"
        self.workshop.refused(who, status, str(error))
        if self.guest is not None:
            self.guest.errors += 1
            self.guest.last_error = str(error)[:120]

    def _answer(self, header: dict[str, Any], frames: list[bytes], status: int = 200) -> asyncio.Future[None]:
        """Send an answer; done once it has left."""
        self.set_status(status)
        self.set_header("Content-Type", TYPE)
        self.set_header("Cache-Control", "no-store")
        return self.finish(pack({"version": VERSION, **header}, frames))

    def log_exception(self, *_args: Any) -> None:
        """Tracebacks are no log of ours."""

    def write_error(self, status_code: int, **_kwargs: Any) -> None:
        self._answer(error_header(FlexError("The workshop could not answer that.")), [], status_code)


@tornado.web.stream_request_body
class _Join(_Door):
    """Taking a place."""

    def prepare(self) -> None:
        self._begin(STRANGER)

    async def post(self) -> None:
        try:
            given, _ = unpack(bytes(self.body), longest=STRANGER)
            _same_version(given)
            self._check_over()
            token, name = given.get("token"), given.get("name")
            if not isinstance(token, str) or not isinstance(name, str) or given.keys() != {"token", "name"}:
                raise MalformedError("To join takes a token and a name.")
            join = functools.partial(self.workshop.join, token, name)  # which may ask a hub
            self._answer(await asyncio.get_running_loop().run_in_executor(None, join), [])
        except RefusedError as error:
            self._refuse(403, error)
        except FlexError as error:
            self._refuse(400, error)


@tornado.web.stream_request_body
class _Ask(_Door):
    """Everything else, from a seat."""

    _counted = _answering = False

    def prepare(self) -> None:
        try:
            self.guest = self.workshop.guests.seated(
                self.request.headers.get("Authorization", "").removeprefix("Bearer ")
            )
        except RefusedError as error:
            self._refuse(403, error)
            return
        if self.guest.under_way >= AT_ONCE:
            self._refuse(429, InputError(f"You have {AT_ONCE} requests under way: wait for an answer."))
            return
        self._begin(GUEST)
        if not self._finished:
            self.guest.under_way += 1  # from its first byte on: what arrives takes memory, too
            self._counted = True

    async def post(self) -> None:
        assert self.guest is not None  # prepare() refused otherwise
        self._answering = True
        try:
            await self._leave(await self._heard(self.guest))
        finally:
            self._over()

    def on_connection_close(self) -> None:
        """Whoever asked has gone, perhaps before all of the request was here."""
        super().on_connection_close()
        if not self._answering:
            self._over()

    def _over(self) -> None:
        if self._counted and self.guest is not None:
            self._counted = False
            self.guest.under_way -= 1

    async def _leave(self, sent: asyncio.Future[None] | None) -> None:
        """Wait until an answer has left; break the connection of who does not read it."""
        if sent is None:
            return
        sent.add_done_callback(lambda known: known.cancelled() or known.exception())  # whoever asked has gone
        done, _ = await asyncio.wait([sent], timeout=UNREAD)
        if not done and self.guest is not None:
            self._note(408, InputError(f"A reply was not read for {UNREAD:g} s, and thrown away."))
            connection: Any = self.request.connection
            connection.stream.close()

    async def _heard(self, guest: Guest) -> asyncio.Future[None] | None:
        """Hear a request, and begin to send its answer; ``None`` if it was refused."""
        found: Job | Answer | None = None
        try:
            guest.use.request()  # also what is then refused
            given, frames = unpack(bytes(self.body), longest=HEADER)
            _same_version(given)
            self.workshop.guests.heard(guest, given.pop("number", None))
            self._check_over()
            found = self.workshop.ask(guest, given.pop("kind", None), given, frames)
            return await self._wait(found) if isinstance(found, Job) else self._answer(*found)
        except RefusedError as error:
            self._refuse(403, error)
        except MalformedError as error:
            self._refuse(400, error)
        except FlexError as error:
            over = isinstance(error, OverLimitError)
            if found is None:  # else it is noted as the job's
                self._note(429 if over else 200, error)
            if over and not guest.use.may_ask:
                await asyncio.sleep(SLOWED)
            return self._answer(error_header(error), [])
        return None

    def _answer(self, header: dict[str, Any], frames: list[bytes], status: int = 200) -> asyncio.Future[None]:
        """With every answer, the number of the last thing that the owner has put up."""
        noticed = {} if self.guest is None else {"noticed": self.workshop.board.last}
        return super()._answer({**header, **noticed}, frames, status)

    async def _wait(self, job: Job) -> asyncio.Future[None]:
        """A job's answer, or after a while how far it is."""
        coming = asyncio.wrap_future(job.done)
        coming.add_done_callback(lambda known: known.cancelled() or known.exception())  # some ask no more
        done, _ = await asyncio.wait([coming], timeout=PATIENCE if not job.is_run else 0.5)
        if done:
            header, frames = coming.result()
            return self._answer({**header, "state": "done"}, frames)
        if job.is_run:
            return self._answer({"ticket": job.ticket, **self.workshop.progress(job)}, [])
        return self._answer(*await coming)


def _same_version(given: dict[str, Any]) -> None:
    version = given.pop("version", None)
    if version != VERSION:
        raise MalformedError(
            f"The workshop speaks version {VERSION}: install the same flexmagic as its owner."
        )


def error_header(error: FlexError) -> dict[str, Any]:
    """An error as it travels: its class's name and its message.

    Also whether to join ``again`` helps, or nothing, as the workshop is ``over``.
    """
    known = next(c for c in type(error).__mro__ if c.__module__ == "flexmagic.errors")
    kinds = {"again": FormerSeatError, "over": OverError}
    more = {word: True for word, kind in kinds.items() if isinstance(error, kind)}
    return {"error": known.__name__, "message": str(error)[:4000], **more}


def _listening(host: str, port: int, before: int) -> list[socket.socket]:
    """Sockets at a port, or without one at that of before if it is free, else at any."""
    wished = [port] if port else [before, 0] if before else [0]
    for one in wished:
        try:
            return tornado.netutil.bind_sockets(one, host.strip("[]"))
        except OSError as error:
            if one == wished[-1]:
                raise ClusterError(f"The workshop cannot listen at {host}:{one}: {error}") from None
    raise AssertionError  # there is always a last one


class Server:
    """A workshop's web server, in a thread of its own until :meth:`close`.

    ``host``: loopback, or an address that others reach; then it speaks TLS, under a certificate of its own.
    A workshop that is gone on with is where it was, under its certificate; ``moved``: unless its port was
    taken. ``hub``: behind which it is a service, and hears its own path alone. Raises
    :class:`ClusterError` for an address that cannot be listened at.
    """

    def __init__(
        self, workshop: Workshop, host: str = "127.0.0.1", port: int = 0, *, hub: Hub | None = None
    ) -> None:
        self.workshop, self._hub = workshop, hub
        before = workshop.memory.door
        if host != LOOPBACK[0] and before.get("host", host) != host:
            raise ClusterError(
                f"The workshop that goes on here is at {before['host']}, not at {host}. Close it for good "
                "before you open another: %flexworkshop close, or `flexmagic workshop close`."
            )
        self.host = host = before.get("host", host)
        self.closed = False
        self._folder = tempfile.TemporaryDirectory(prefix="flexmagic-")
        context: ssl.SSLContext | None = None
        self._print, door = "", dict[str, Any](host=host)
        if host not in LOOPBACK and hub is None:  # the hub's proxy speaks TLS for its services
            if workshop.guests.key:
                raise ClusterError("Beyond this machine every guest needs a token of their own.")
            folder = Path(self._folder.name)
            of_it = certificate.Certificate(**before["tls"]) if before else certificate.make(folder)
            context, self._print = of_it.context(folder), of_it.fingerprint
            door["tls"] = asdict(of_it)
        self._sockets = _listening(host, port, before.get("port", 0))
        self.port: int = self._sockets[0].getsockname()[1]
        self.moved = bool(before) and self.port != before["port"]
        workshop.memory.door = {**door, "port": self.port}
        workshop.memory.save()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._serve, args=(context, started), name="flexmagic-gateway", daemon=True
        )
        self._thread.start()
        started.wait()

    @property
    def lines(self) -> dict[str, str]:
        """What guests type to join: one line for all under ``""``, or one for each guest under the name."""
        if self._hub is not None:
            return {"": f"%flexcluster join {self._hub.url}".rstrip()}
        tokens = {"": self.workshop.guests.key} if self.workshop.guests.key else self.workshop.guests.tokens
        return {
            name: f"%flexcluster join {Address(self.host, self.port, token, self._print)}"
            for name, token in tokens.items()
        }

    def _serve(self, context: ssl.SSLContext | None, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main(context, started))
        self._loop.close()

    async def _main(self, context: ssl.SSLContext | None, started: threading.Event) -> None:
        given = {"workshop": self.workshop}
        prefix = "" if self._hub is None else re.escape(self._hub.prefix)
        rooms = [(f"{prefix}/join", _Join, given), (f"{prefix}/ask", _Ask, given)]
        application = tornado.web.Application(rooms, log_function=lambda _handler: None)
        server = tornado.httpserver.HTTPServer(
            application, ssl_options=context, max_body_size=STRANGER, max_header_size=16 << 10,
            idle_connection_timeout=IDLE, body_timeout=60,
        )  # fmt: skip
        server.add_sockets(self._sockets)
        started.set()
        await self._stop.wait()
        server.stop()
        await server.close_all_connections()

    def __repr__(self) -> str:
        """Which cluster, and where it listens."""
        return f"<Workshop on {self.workshop.name} at {self.host}:{self.port}>"

    def close(self, *, for_good: bool = True) -> None:
        """Hear no more, and close the workshop; not ``for_good``, so that it can be gone on with."""
        self.closed = True
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self.workshop.close(for_good=for_good)
        with contextlib.suppress(OSError):
            self._folder.cleanup()
