"""Proof that guests' runs leave the weights as they were, and what to do when one did not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexmagic.client.tenant import Host, Versions

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
        self._expected = self._sums
        self._runs = 0
        self.checks = 0

    def before_run(self, versions: Versions) -> None:
        """Take the sums anew if somebody else has written into weights since: the owner."""
        if versions != self._versions:
            self.look()

    def put_back(self, names: list[str]) -> str:
        """Load changed parameters again; ``""`` if all weights then have their sums again, else why not.

        Raises nothing: what goes wrong is a reason.
        """
        wanted = self._expected
        try:
            self._host.put_back(names)
            self._versions, self._sums = self._host.weights()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the workshop is to pause then
            return str(error).partition("\n")[0] or type(error).__name__
        return "" if self._sums == wanted else "what was loaded again differs from what was there before"

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
        self._expected = before if same else sums
        if not same:
            return []
        return sorted({n for b, a in zip(before, sums, strict=True) for n in a if b.get(n) != a[n]})
