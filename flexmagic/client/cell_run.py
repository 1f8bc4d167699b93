"""What a cell on the engines left behind: its value, and a run for each of its forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError, SiteError

if TYPE_CHECKING:
    from flexmagic.client.activation import Activation
    from flexmagic.client.run import Run
    from flexmagic.engine.cell import CellAnswer


class ByRank(dict[int, Any]):
    """Values that differ between ranks, by rank."""

    def __repr__(self) -> str:
        """A line for each rank."""
        return "\n".join(f"rank {rank}: {value!r}" for rank, value in self.items())


class CellRun:
    """A cell's ``value``, and its forwards of the model as runs.

    ``value``: that of the cell's last expression, once if all ranks have the same, else by rank.
    Indexed with a site it gives the last forward that captured it.
    """

    def __init__(self, answers: Sequence[CellAnswer], runs: Sequence[Run]) -> None:
        import cloudpickle

        self.runs = list(runs)
        for run in self.runs:
            run.among = self.runs
        self.value: Any = cloudpickle.loads(answers[0].value)
        if len({answer.digest for answer in answers}) > 1:
            self.value = ByRank({rank: cloudpickle.loads(a.value) for rank, a in enumerate(answers)})

    def step(self, number: int) -> Run:
        """One forward, counted from 0, or from the end if negative; raises :class:`InputError` beyond."""
        if not -len(self.runs) <= number < len(self.runs):
            raise InputError(f"There is no step {number}: the cell ran the model {len(self.runs)} times.")
        return self.runs[number]

    def __getitem__(self, site: str) -> Activation:
        """The activation at a site in the last forward that captured it; raises as :class:`Run` does."""
        if not self.runs:
            raise SiteError("The cell did not run the model, so it captured nothing.")
        return next((run for run in reversed(self.runs) if run.has(site)), self.runs[-1])[site]

    def __repr__(self) -> str:
        """How often the model ran, and the kind of the value."""
        return f"<CellRun: {len(self.runs)} forwards, value {type(self.value).__name__}>"
