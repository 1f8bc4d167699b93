"""Opening a workshop: the gateway and its door together, and what is said of them."""

from __future__ import annotations

from pathlib import Path

from flexmagic.workshop.address import LOOPBACK
from flexmagic.workshop.allowance import Allowance
from flexmagic.workshop.gateway import GUESTS, TOGETHER, Workshop
from flexmagic.workshop.serving import Server


def open_workshop(
    cluster: str | None,
    *,
    guests: int = GUESTS,
    limits: str = "",
    host: str = "127.0.0.1",
    port: int = 0,
    trusted: bool = False,
    together: int = TOGETHER,
    journal: str | Path | None = None,
) -> Server:
    """Let guests work on a running cluster's model; ``close()`` ends it.

    ``cluster``: its id or profile, or the only one there is. Beyond this machine (``host``) every guest
    has a token, and all is TLS. ``limits``: as :meth:`Allowance.changed` reads them. Raises
    :class:`ClusterError`, :class:`ModelError` or :class:`InputError`.
    """
    allowance = Allowance().changed(limits)
    workshop = Workshop(
        cluster, guests=guests, allowance=allowance, trusted=trusted, together=together,
        open_to_all=host in LOOPBACK, journal=None if journal is None else Path(journal),
    )  # fmt: skip
    try:
        return Server(workshop, host, port)
    except BaseException:
        workshop.close()
        raise


def announcement(server: Server) -> str:
    """The line or lines for the guests, and what they may do, as text."""
    lines = [f"{name}: {line}" if name else line for name, line in server.lines.items()]
    head = "For the guests:" if len(lines) == 1 else "For each guest, and nobody else:"
    workshop = server.workshop
    more = [workshop.rules, f"Limits of each: {workshop.allowance}", f"Log: {workshop.journal.path}"]
    return "\n".join([head, *lines, "", *more])
