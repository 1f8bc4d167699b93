"""How the ranks are, as a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from flexmagic.client.table import Table, size_text

if TYPE_CHECKING:
    from flexmagic.engine.verbs import Seat
    from flexmagic.engine.vitals import Vital
    from flexmagic.engine.watch import Whereabouts

COLUMNS = ("rank", "engine", "host", "pid", "device", "memory", "model part", "captures", "state")


def status_table(
    seats: Sequence[Seat],
    engines: Sequence[int],
    vitals: Mapping[int, tuple[Whereabouts, Vital | None] | None],
    ended: Collection[int],
    title: str,
) -> Table:
    """One row per rank; ``vitals``: where and how each is that answered on its control channel."""
    rows = []
    for seat in seats:
        said = vitals.get(seat.rank)
        memory = part = captured = ""
        state = "ended" if seat.rank in ended else "does not answer"
        if said is not None:
            state = _state(said[0])
            vital = said[1]
            memory = "" if vital is None else size_text(vital.memory)
            captured = "" if vital is None else size_text(vital.capture_bytes)
            part = "no model"
            if vital is not None and vital.model:
                part = f"{vital.model} {size_text(vital.parameter_bytes)}"
        engine = str(engines[seat.rank])
        row = (str(seat.rank), engine, seat.host, str(seat.pid), seat.device, memory, part, captured, state)
        rows.append(row)
    return Table(COLUMNS, tuple(rows), title)


def _state(place: Whereabouts) -> str:
    return f"{place} ({place.since:.1f} s)" if place.since else str(place)
