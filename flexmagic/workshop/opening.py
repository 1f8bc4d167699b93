"""Opening a workshop: the gateway and its door together, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flexmagic.errors import ClusterError
from flexmagic.workshop.address import LOOPBACK
from flexmagic.workshop.allowance import Allowance
from flexmagic.workshop.gateway import GUESTS, TOGETHER, Workshop
from flexmagic.workshop.hub import Hub
from flexmagic.workshop.memory import Memory
from flexmagic.workshop.serving import Server

if TYPE_CHECKING:
    from flexmagic.client.session import Session


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
    kernel: str = "",
    hub: Hub | None = None,
) -> Server:
    """Let guests work on a running cluster's model; ``close()`` ends it.

    ``cluster``: its id or profile, or the only one there is. Beyond this machine (``host``) every guest
    has a token, and all is TLS. ``limits``: as :meth:`Allowance.changed` reads them. ``kernel``: of the
    notebook that opens it, see :class:`Memory`. ``hub``: as a service of which it runs, at the address that
    the hub has given it; guests are its users. A workshop whose gateway has ended is gone on with. Raises
    :class:`ClusterError`, :class:`ModelError` or :class:`InputError`.
    """
    allowance = Allowance().changed(limits) if limits else None
    if hub is not None:
        host, port = hub.host, hub.port
    workshop = Workshop(
        cluster, guests=guests, allowance=allowance, trusted=trusted, together=together,
        open_to_all=host in LOOPBACK and hub is None, journal=None if journal is None else Path(journal),
        users=None if hub is None else hub.user,
    )  # fmt: skip
    try:
        workshop.memory.kernel = kernel
        return Server(workshop, host, port, hub=hub)
    except BaseException:
        workshop.close(for_good=not workshop.goes_on)
        raise


def end_workshop(cluster: str | None) -> str:
    """Close a workshop for good whose gateway has ended; what became of it, in a line.

    Raises :class:`ClusterError` if there is none, or if its gateway is at work.
    """
    workshop = Workshop(cluster, ending=True)
    workshop.close()
    if not workshop.goes_on:
        raise ClusterError(f"No workshop was left on {workshop.name}.")
    return f"The workshop on {workshop.name} is closed. The engines and the model are as they were."


def left_by(session: Session, kernel: str) -> bool:
    """Whether an earlier process of a kernel left a workshop on a session's cluster."""
    folder = session._cluster._security  # noqa: SLF001 - where the cluster's own files are
    return Memory(folder, session.cluster_name).left_by(kernel)


def announcement(server: Server) -> str:
    """The line or lines for the guests, and what they may do, as text."""
    lines = [f"{name}: {line}" if name else line for name, line in server.lines.items()]
    workshop = server.workshop
    head = [*_of_before(server), *([_head(server)] if lines else [])]
    more = [_rules(workshop), f"Limits of each: {workshop.allowance}", f"Log: {workshop.journal.path}"]
    return "\n".join([*head, *lines, "", *more])


def _rules(workshop: Workshop) -> str:
    """What becomes of guests' code, in a sentence."""
    if workshop.trusted:
        return "Guests are trusted: their hooks' code runs in the engines, with all that these can do."
    if workshop.no_boxes:
        return f"Hooks with code are off: {workshop.no_boxes}. Those without code (--do) work."
    return "The code of guests' hooks runs in boxes, without files, network or model (seccomp)."


def _head(server: Server) -> str:
    if "" in server.lines and not server.workshop.guests.key:
        known = "http" in server.lines[""]
        return f"For the hub's users{'' if known else ', whose servers have FLEXMAGIC_WORKSHOP'}:"
    if not server.workshop.guests.key:
        return "For each guest, and nobody else:"
    return "For guests who are new:" if server.workshop.goes_on else "For the guests:"


def _of_before(server: Server) -> list[str]:
    """What is to be said of a workshop that goes on."""
    if not server.workshop.goes_on:
        return []
    known = sum(1 for guest in server.workshop.guests if guest.former)
    said = f"The workshop goes on: {known} guests are known, and their lines of before let them in."
    if server.moved:
        said += (
            f" Its port was taken by something else: they type their lines again with port {server.port}, "
            "or the workshop is stopped and opened again once that port is free."
        )
    return [said]
