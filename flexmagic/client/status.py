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
    seats: Sequence[Seat | None],
    engines: Sequence[int],
    vitals: Mapping[int, tuple[Whereabouts, Vital | None] | None],
    ended: Collection[int],
    title: str,
) -> Table:
    """One row per rank; ``vitals``: where and how each is that answered on its control channel.

    ``seats``: where each sits; ``None`` for one that had ended before it was seen.
    """
    rows = []
    for rank, seat in enumerate(seats):
        said = vitals.get(rank)
        memory = part = captured = ""
        state = "ended" if rank in ended else "does not answer"
        if said is not None:
            state = _state(said[0])
            vital = said[1]
            memory = "" if vital is None else size_text(vital.memory)
            captured = "" if vital is None else size_text(vital.capture_bytes)
            part = "no model"
            if vital is not None and vital.model:
                part = f"{vital.model} {size_text(vital.parameter_bytes)}"
        sits = ("", "", "") if seat is None else (seat.host, str(seat.pid), seat.device)
        rows.append((str(rank), str(engines[rank]), *sits, memory, part, captured, state))
    return Table(COLUMNS, tuple(rows), title)


def _state(place: Whereabouts) -> str:
    return f"{place} ({place.since:.1f} s)" if place.since else str(place)
