"""A guest's connection to a gateway: one request after the other, and the same place after any break.

A gateway that is gone is waited for, for as long as its owner may need to start it again.
"""

from __future__ import annotations

import getpass
import hashlib
import hmac
import http.client
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from flexmagic import errors
from flexmagic.errors import ClusterError, FlexError
from flexmagic.workshop.address import Address
from flexmagic.workshop.frames import TYPE, VERSION, pack, unpack

LONGEST = 96 << 20
"""Bytes of the longest answer that is taken."""

TIMEOUT = 120.0
"""Seconds within which an answer comes or the connection counts as broken."""

GLANCE = 5.0
"""The same, for what is asked for in the background."""


PROXIES = (502, 503, 504)
"""What a hub's proxy says while the gateway behind it is away."""

NO_WAY = (404, 405)
"""What it, or the hub, says while the hub is starting, or of a service that there is not."""

OF_ONE_GATEWAY = ("wait", "cancel")
"""Requests about a run under way, which ends with the gateway."""

PATIENCE = 120.0
"""Seconds for which a gateway that has ended is waited for."""

EVERY = 0.3
"""Seconds between two tries to reach it."""

SOON = 1.0
"""Seconds after which it is said that it is waited for."""


class StartedAgainError(ClusterError):
    """The gateway was started again while something was asked that is not asked twice by itself."""


class _AwayError(ClusterError):
    """Nobody answers. ``heard``: whether the gateway may have heard the request before it ended."""

    heard = True


class _FormerSeatError(ClusterError):
    """The gateway knows the place, but was started again since it was taken."""


class _InOne(http.client.HTTPConnection):
    """A connection whose requests leave in one piece, head and body: the gateway wakes up once for each."""

    _held: bytes | None = None

    def request(self, *args: Any, **kwargs: Any) -> None:
        self._held = b""
        try:
            super().request(*args, **kwargs)
            whole, self._held = self._held, None
            self.send(whole)
        finally:
            self._held = None

    def send(self, data: Any) -> None:
        if self._held is None:
            super().send(data)
        else:
            self._held += data


class _InOneSafely(_InOne, http.client.HTTPSConnection):
    """The same, over TLS."""


class _Known(_InOneSafely):
    """A connection to whoever holds the certificate of a fingerprint; nothing is sent to anybody else."""

    def __init__(self, host: str, port: int, fingerprint: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint says more
        super().__init__(host, port, timeout=TIMEOUT, context=context)
        self._fingerprint = fingerprint

    def connect(self) -> None:
        super().connect()
        found: Any = self.sock
        seen = hashlib.sha256(found.getpeercert(binary_form=True) or b"").hexdigest()
        if not hmac.compare_digest(seen, self._fingerprint):
            self.close()
            raise ClusterError(
                "Whoever answers there is not the workshop that the address names: "
                "its fingerprint is another."
            )


class Link:
    """A place in a workshop. ``facts``: what the gateway said at joining; ``say``: tells the guest of breaks.

    ``patience``: seconds for which a gateway that has ended is waited for.
    ``noticed``: the number of the last thing that its owner has put up, as far as is known here.
    """

    def __init__(self, address: Address, name: str = "") -> None:
        self._address = address
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None
        self._number = 0
        self._broken = False
        self._over = ""
        self._name = name or _user()
        self.facts: dict[str, Any] = {}
        self.say: Callable[[str], None] = print
        self.patience = PATIENCE
        self.noticed = 0
        self.join()

    @property
    def address(self) -> Address:
        """What brings this guest back to the same place, from any notebook."""
        at = self._address
        return replace(at, token=self.facts.get("token") or at.token)

    def join(self) -> None:
        """Take the place, for the first time or again; raises :class:`ClusterError`."""
        with self._lock:
            self._join()

    def _join(self) -> None:
        raw = pack({"version": VERSION, "token": self.address.token, "name": self._name})
        header, _ = self._sent("/join", raw, {})
        had = self.facts.get("token", "")
        self.facts = {**header, "token": header.get("token") or had}
        self._number = 0

    def ask(
        self, kind: str, frames: list[bytes] | None = None, *, once: bool = False, **fields: Any
    ) -> tuple[dict[str, Any], list[bytes]]:
        """One request; its answer's header and frames. Raises what the gateway refuses with.

        A gateway that has ended is waited for, and asked again when it is back; not ``once``, if it may have
        heard it already, or knows it no more: :class:`StartedAgainError`.
        """
        with self._lock:
            heard = False
            while True:
                self._number += 1
                raw = pack({"version": VERSION, "number": self._number, "kind": kind, **fields}, frames or [])
                try:
                    return self._sent("/ask", raw, {"Authorization": f"Bearer {self.facts['seat']}"})
                except _AwayError as error:
                    heard = heard or error.heard
                    self._wait(error)
                except _FormerSeatError:
                    self._join()
                    self._back()
                if kind in OF_ONE_GATEWAY or (once and heard):
                    raise StartedAgainError(
                        "The workshop's gateway was started again while you asked this. Look whether it was "
                        "done (%flexhook), and ask again if not."
                    )

    def _wait(self, error: _AwayError) -> None:
        """Wait for a gateway that has ended, and take the place again; raises if it stays away or is over."""
        if self._over:
            raise ClusterError(self._over)
        began, said = time.monotonic(), False
        while (waited := time.monotonic() - began) < self.patience:
            if waited > SOON and not said:
                said = True
                self.say(
                    f"The workshop does not answer. It is waited for, up to {self.patience:.0f} s; "
                    "interrupt to wait no longer."
                )
            try:
                self._join()
            except _AwayError:
                time.sleep(EVERY)
            else:
                self._back()
                return
        raise ClusterError(str(error))

    def _back(self) -> None:
        notice = self.facts.get("notice") or "hooks and runs are as they were."
        self.say(f"The workshop's gateway was started again. You are {self.facts['guest']}: {notice}")

    def _sent(self, path: str, raw: bytes, headers: Mapping[str, str]) -> tuple[dict[str, Any], list[bytes]]:
        self._broken = False
        try:
            body = self._exchanged(path, raw, {"Content-Type": TYPE, **headers})
        except FlexError:
            self.close()
            raise
        except (OSError, http.client.HTTPException) as error:
            self.close()
            away = (ClusterError if isinstance(error, TimeoutError) else _AwayError)(self._away(error))
            if isinstance(away, _AwayError):
                away.heard = self._broken or not isinstance(error, ConnectionRefusedError)
            raise away from None
        except BaseException:
            self.close()  # an answer that was not read would be taken for the next one's
            raise
        if len(body) > LONGEST:
            self.close()
            raise ClusterError("The workshop's answer is longer than any that it may give.")
        header, frames = unpack(body, longest=32 << 20, strict=False)
        if type(noticed := header.pop("noticed", None)) is int:
            self.noticed = noticed
        if "error" in header:
            self._over = str(header["message"]) if header.get("over") is True else ""
            raise _error(header)
        return header, frames

    def _exchanged(self, path: str, raw: bytes, headers: Mapping[str, str]) -> bytes:
        """One answer; asked for again where a connection was closed meanwhile, which does nothing twice."""
        old, self._connection = self._connection, self._connection or self._open()
        try:
            self._connection.request("POST", self._address.prefix + path, raw, dict(headers))
            answer = self._connection.getresponse()
            if answer.getheader("Content-Type") == TYPE:
                return answer.read(LONGEST + 1)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            if old is None:
                raise
            self._broken = True
            self.close()
            return self._exchanged(path, raw, headers)
        self.close()
        if answer.status in PROXIES or (self._address.url and answer.status in NO_WAY):
            raise http.client.HTTPException(f"HTTP {answer.status}")
        raise ClusterError(
            f"Who answers at {self._address.host}:{self._address.port} is no workshop (HTTP {answer.status})."
        )

    def _away(self, error: Exception) -> str:
        """What to say of a workshop that does not answer."""
        at, name = f"{self._address.host}:{self._address.port}", type(error).__name__
        if self._address.url and isinstance(error, http.client.HTTPException):
            return (
                f"JupyterHub at {at} reaches no workshop at {self._address.prefix} ({error}). If the hub or "
                "the workshop has just been started, try again; else ask who runs the hub for its address."
            )
        return (
            f"The workshop at {at} does not answer ({name}). "
            "Try again; a workshop that was opened anew has a new line for you to join."
        )

    def _open(self) -> http.client.HTTPConnection:
        host = self._address.host.strip("[]")
        if self._address.fingerprint:
            return _Known(host, self._address.port, self._address.fingerprint)
        if self._address.secure:
            return _InOneSafely(host, self._address.port, timeout=TIMEOUT)
        return _InOne(host, self._address.port, timeout=TIMEOUT)

    def glance(self, kind: str, **fields: Any) -> tuple[dict[str, Any], list[bytes]] | None:
        """A request that holds up nothing: ``None`` while another is under way; else it has a few seconds.

        Raises what the gateway refuses with, or that it does not answer.
        """
        if not self._lock.acquire(blocking=False):
            return None
        try:
            self._number += 1
            raw = pack({"version": VERSION, "number": self._number, "kind": kind, **fields})
            self._connection = self._connection or self._open()
            self._hurry(GLANCE)
            answer = self._sent("/ask", raw, {"Authorization": f"Bearer {self.facts['seat']}"})
        except _FormerSeatError:
            self._join()
            self._back()
            return None
        else:
            return answer
        finally:
            self._hurry(TIMEOUT)
            self._lock.release()

    def _hurry(self, seconds: float) -> None:
        """Have the connection break if an answer takes longer."""
        if self._connection is not None:
            self._connection.timeout = seconds
            if self._connection.sock is not None:
                self._connection.sock.settimeout(seconds)

    def close(self) -> None:
        """Break the connection; the place is kept, and the next request connects again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _error(header: Mapping[str, Any]) -> FlexError:
    if header.get("again") is True:
        return _FormerSeatError(str(header.get("message", "")))
    kind = getattr(errors, str(header["error"]), FlexError)
    simple = isinstance(kind, type) and issubclass(kind, FlexError) and kind is not errors.StuckError
    return (kind if simple else FlexError)(str(header.get("message", "")))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "guest"
