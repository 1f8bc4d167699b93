"""Where a workshop is and what lets one in: the one word that a guest types."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from flexmagic.errors import InputError

_FORM = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.-]+):(?P<port>\d{1,5})/(?P<token>[\w-]{8,80})(?:/(?P<print>[0-9a-f]{64}))?"
)

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Hosts to which one may speak without TLS."""


HUB = "FLEXMAGIC_WORKSHOP"
"""The environment variable in which a JupyterHub can say where its workshop is."""


@dataclass(frozen=True)
class Address:
    """``host:port/token``, and beyond this machine the fingerprint of the gateway's certificate.

    Or ``url``: that of a service of JupyterHub; the token is then the hub's own, from the environment.
    """

    host: str
    port: int
    token: str
    fingerprint: str = ""
    url: str = ""

    @classmethod
    def read(cls, text: str) -> Address:
        """An address as it was typed; raises :class:`InputError`, also for one in the open without TLS."""
        if text.startswith(("http://", "https://")):
            return cls._of_hub(text.rstrip("/"))
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

    @classmethod
    def _of_hub(cls, url: str) -> Address:
        token, where = os.environ.get("JUPYTERHUB_API_TOKEN", ""), urlsplit(url)
        host = f"[{where.hostname}]" if ":" in (where.hostname or "") else where.hostname or ""
        if not token:
            raise InputError(
                "That workshop is a service of JupyterHub, and this notebook is none of a hub's."
            )
        if where.scheme != "https" and host not in LOOPBACK:
            raise InputError("A workshop on another machine is at an address that begins with https://.")
        return cls(host, where.port or (443 if where.scheme == "https" else 80), token, url=url)

    @property
    def prefix(self) -> str:
        """What comes before the path of every request."""
        return urlsplit(self.url).path

    @property
    def secure(self) -> bool:
        """Whether it is one of a hub whose certificate the system knows."""
        return self.url.startswith("https://")

    def __str__(self) -> str:
        """As it is typed."""
        if self.url:
            return self.url
        return f"{self.host}:{self.port}/{self.token}" + (f"/{self.fingerprint}" if self.fingerprint else "")
