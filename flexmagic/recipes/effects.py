"""What recipes of interventions share: a metric measured at every place, and the effects that it shows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic import Shown
    from flexmagic.client.session import Session
    from flexmagic.recipes.named import Named


@dataclass(frozen=True, eq=False)
class Effects(ABC):
    """Effects by place, and the metric as it was measured at the same places."""

    effect: Named
    metric: Named

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each place with its effect and metric: what a data frame takes."""
        return [
            {**row, "metric": value}
            for row, value in zip(self.effect.rows(), self.metric.values.ravel().tolist(), strict=True)
        ]

    def largest(self, count: int = 5) -> list[dict[str, Any]]:
        """The places with the largest effects of either sign, first the largest."""
        return sorted(self.rows(), key=lambda row: -abs(row["effect"]))[:count]

    @abstractmethod
    def grid(self) -> Shown:
        """The effects as a grid."""

    def _ipython_display_(self) -> None:
        self.grid()._ipython_display_()

    def _best(self) -> str:
        """The place with the largest effect, in words."""
        row = self.largest(1)[0]
        at = ", ".join(f"{k} {v}" for k, v in row.items() if k not in {"effect", "metric"})
        return f"largest effect {row['effect']:.3f} at {at}"


def swept(
    session: Session,
    inputs: Any,
    code: str,
    over: Mapping[str, Sequence[Any]],
    *,
    memory: int | None,
    **options: Any,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What a sweep saved as ``value``, and whether its intervention changed anything, as ``changed``."""
    limits: dict[str, Any] = {} if memory is None else {"memory": memory}
    sweep = session.sweep(inputs, code, over, **options, **limits)
    values, changed = sweep["value"].astype(np.float64), sweep["changed"].astype(np.bool_)
    for run in sweep.runs:
        run.release()
    return values, changed
