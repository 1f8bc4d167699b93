"""How a workshop stands: for its owner, guest by guest, and for one guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmagic.client.table import Table, size_text

if TYPE_CHECKING:
    from flexmagic.workshop.desk import Desk
    from flexmagic.workshop.gateway import Workshop
    from flexmagic.workshop.guests import Guest

COLUMNS = ("guest", "state", "runs", "time", "hooks", "held", "fetched", "errors", "last error")


def to_owner(workshop: Workshop, waiting: int) -> Table:
    """Who is there, what they wait for, what they have taken, and what failed last."""
    rows = []
    for guest in workshop.guests:
        hooks = 0 if guest.tenant is None else len(guest.tenant.hooks)
        state, taken = _state(workshop, guest), size_text(guest.use.bytes_moved)
        rows.append((
            guest.name, state, str(guest.use.done), f"{guest.use.seconds:.1f} s", str(hooks),
            str(len(guest.runs)), taken, str(guest.errors), guest.last_error,
        ))  # fmt: skip
    paused = ", PAUSED" if workshop.paused else ""
    title = f"Workshop on {workshop.name}: {waiting} runs wait{paused}. {workshop.alarm}"
    return Table(COLUMNS, tuple(rows), title.strip())


def _state(workshop: Workshop, guest: Guest) -> str:
    job = next((j for j in list(guest.jobs.values()) if not j.done.done()), None)
    if job is None:
        return "idle" if guest.seat else "away"
    said = workshop.progress(job)
    return "runs" if said["state"] == "runs" else f"{said['state']}, {said['place']} before"


def to_guest(workshop: Workshop, desk: Desk, model: str, guest: Guest) -> Table:
    """Who a guest is, the model, what it may take and has taken."""
    rows = (
        ("guest", guest.name),
        ("model", model),
        ("runs done", str(guest.use.done)),
        ("fetched", size_text(guest.use.bytes_moved)),
        ("limits", str(workshop.allowance)),
        ("sent by the owner", str(len(workshop.board.since(0)) or "nothing yet")),
        ("workshop", "paused" if desk.paused else f"{desk.waiting} runs wait"),
    )
    return Table(("", ""), rows)
