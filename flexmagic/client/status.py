"""How the ranks are, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client.table import Table, size_text

if TYPE_CHECKING:
    from flexmagic.engine.verbs import Seat

COLUMNS = ("rank", "engine", "host", "pid", "device", "memory", "model part", "state")


def status_table(
    seats: Sequence[Seat], engines: Sequence[int], vitals: Sequence[tuple[str, Any]], title: str
) -> Table:
    """One row per rank; ``vitals``: each rank's state, and what it says of itself if it answers."""
    rows = []
    for seat in seats:
        state, vital = vitals[seat.rank]
        memory = "" if vital is None else size_text(vital.memory)
        part = "" if vital is None else "no model"
        if vital is not None and vital.model:
            part = f"{vital.model} {size_text(vital.parameter_bytes)}"
        engine = str(engines[seat.rank])
        rows.append((str(seat.rank), engine, seat.host, str(seat.pid), seat.device, memory, part, state))
    return Table(COLUMNS, tuple(rows), title)
