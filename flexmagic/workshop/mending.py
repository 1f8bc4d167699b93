"""What is done about an engine that ends while guests' work is under way: a new one, and the work again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flexmagic.errors import EngineError, FlexError

if TYPE_CHECKING:
    from flexmagic.client.tenant import Host
    from flexmagic.workshop.desk import Job
    from flexmagic.workshop.journal import Journal

MENDED = "Note: an engine had ended and was started again with your hooks; this was done after that.\n"
NOT_MENDED = "An engine of the workshop has ended, and its owner has to start it again."
ENDED_TWICE = "An engine ended, was started again, and ended again in this, which is not tried once more."
"""What guests are told of engines that end."""


class Mending:
    """Does jobs by ``tried``, which leaves open those that an engine's end kept from being done, and says so.

    ``fail`` ends jobs with an error.
    """

    def __init__(
        self,
        host: Host,
        journal: Journal,
        tried: Callable[[list[Job]], list[EngineError]],
        fail: Callable[[list[Job], FlexError], None],
    ) -> None:
        self._host, self._journal, self._tried, self._fail = host, journal, tried, fail

    def do(self, jobs: list[Job]) -> None:
        """Do some jobs; what an engine that ended has kept from being done once more, each by itself."""
        ended = self._tried(jobs)
        if not ended:
            return
        mended = self._mended(ended[0])
        for job in [job for job in jobs if not job.done.done()]:
            if not mended:
                self._fail([job], EngineError(NOT_MENDED))
                continue
            job.guest.said.append(MENDED)
            if second := self._tried([job]):
                self._fail([job], EngineError(ENDED_TWICE if self._mended(second[0]) else NOT_MENDED))

    def _mended(self, error: EngineError) -> bool:
        """Start an engine again that has ended, unless all have; whether that could be done."""
        if self._host.is_over:
            return False
        self._journal.note("gateway", "engine ended", error=str(error)[:200])
        try:
            with self._host.unhurried():
                self._host.session.recover()
        except (Exception, KeyboardInterrupt) as worse:  # noqa: BLE001 - the worker must live
            self._journal.note("gateway", "not recovered", error=str(worse)[:200])
            return False
        self._journal.note("gateway", "recovered")
        return True
