"""Where a workshop is and what lets one in: the one word that a guest types."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flexmagic.errors import InputError

_FORM = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.-]+):(?P<port>\d{1,5})/(?P<token>[\w-]{8,80})(?:/(?P<print>[0-9a-f]{64}))?"
)

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Hosts to which one may speak without TLS."""


@dataclass(frozen=True)
class Address:
    """``host:port/token``, and beyond this machine the fingerprint of the gateway's certificate."""

    host: str
    port: int
    token: str
    fingerprint: str = ""

    @classmethod
    def read(cls, text: str) -> Address:
        """An address as it was typed; raises :class:`InputError`, also for one in the open without TLS."""
        found = _FORM.fullmatch(text.strip())
        if found is None or int(found["port"]) > 65535:
            raise InputError(
                "That is no address of a workshop. Copy the whole line that its owner sent: "
                "%flexcluster join HOST:PORT/TOKEN."
            )
        made = cls(found["host"], int(found["port"]), found["token"], found["print"] or "")
        if not made.fingerprint and made.host not in LOOPBACK:
            raise InputError("A workshop on another machine has a fingerprint at the end of its address.")
        return made

    def __str__(self) -> str:
        """As it is typed."""
        return f"{self.host}:{self.port}/{self.token}" + (f"/{self.fingerprint}" if self.fingerprint else "")
