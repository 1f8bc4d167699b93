"""Proof that guests' runs leave the weights as they were, and what to do when one did not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexmagic.client.tenant import Host

Sums = list[dict[str, tuple[int, int]]]

EVERY = 100
"""Runs after which the sums over all weights are looked at again."""


class WeightsWatch:
    """Sums over the bits of all weights, compared again after some runs.

    What the owner writes moves torch's counters, and then the sums are taken anew; what changes without
    them moving was written past torch.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._versions, self._sums = host.weights()
        self._runs = 0
        self.checks = 0

    def after_runs(self, count: int) -> list[str]:
        """Count runs, and look at the weights when it is time; names parameters that changed unseen."""
        self._runs += count
        if self._runs < EVERY:
            return []
        return self.look()

    def look(self) -> list[str]:
        """Compare all weights now; names the parameters that changed unseen."""
        self._runs = 0
        self.checks += 1
        versions, sums = self._host.weights()
        before, self._sums = self._sums, sums
        same, self._versions = versions == self._versions, versions
        if not same:
            return []
        return sorted({n for b, a in zip(before, sums, strict=True) for n in a if b.get(n) != a[n]})
