"""Making the ranks' process groups again, and the plain calls that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flexmagic.client import engine_side
from flexmagic.client.ranks import Ranks
from flexmagic.client.recovery import meeting_at, together
from flexmagic.client.waiting import Waiting
from flexmagic.client.watching import SILENT, SILENT_AT_FIRST, TimeLimits
from flexmagic.errors import ClusterError, FlexError, StuckError, UserCodeError

HELP = "The process groups could not be made again. Type %flexcluster recover."


class Regroup:
    """Calls without the care that other calls take: they are what that care is made of."""

    def __init__(self, ranks: Ranks, waiting: Waiting) -> None:
        self._ranks = ranks
        self._waiting = waiting

    def each(
        self,
        requests: Mapping[int, tuple[Callable[..., Any], tuple[Any, ...]]],
        *,
        silent: float = SILENT,
    ) -> dict[int, Any]:
        """Have ranks run functions of :mod:`engine_side`, each its own, at once.

        Ranks that wait in vain are freed, and :class:`StuckError` raised. The session's limits do
        not hold: what is to help is not cut short.
        """
        pending = {
            rank: self._ranks.ask(rank, function, *args) for rank, (function, args) in requests.items()
        }
        verdict = self._waiting.watch(pending, silent=silent, limits=TimeLimits())
        if verdict is not None:
            said = self._waiting.said(pending)
            self._waiting.free(pending)
            raise StuckError(verdict, said, HELP)
        return {rank: self._ranks.value(rank, answer) for rank, answer in pending.items()}

    def everywhere(self, function: Callable[..., Any], *args: Any, silent: float = SILENT) -> list[Any]:
        """The same function on every rank; results in rank order."""
        size = self._ranks.world_size
        said = self.each(dict.fromkeys(range(size), (function, args)), silent=silent)
        return [said[rank] for rank in range(size)]

    def prepare(self, ranks: Iterable[int]) -> None:
        """Have engines import what they need, which takes seconds in which they may say nothing."""
        self.each(dict.fromkeys(ranks, (engine_side.prepare, ())), silent=SILENT_AT_FIRST)

    def verb(self, name: str, ranks: Iterable[int], *args: Any) -> dict[int, Any]:
        """What ranks answer to a verb; raises what they refuse with."""
        payload = engine_side.packed(args)
        replies = self.each(dict.fromkeys(ranks, (engine_side.call, (name, payload))))
        errors = {rank: reply.error for rank, reply in replies.items() if reply.error is not None}
        if errors:
            raise merged(errors)
        return {rank: reply.value for rank, reply in replies.items()}

    def offer_place(self) -> tuple[str, int]:
        """A host and a free port on it where rank 0 can serve a store that all ranks reach."""
        hosts = self.everywhere(engine_side.host_name)
        host = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
        return host, self.each({0: (engine_side.offer_port, (host,))})[0]

    def rebuild(self) -> None:
        """Make all process groups again, in a new generation; nothing happens while an engine is missing.

        Raises :class:`ClusterError` if that does not succeed.
        """
        if self._ranks.ended():
            return
        everyone = range(self._ranks.world_size)
        members = self.verb("groups", everyone)
        specs = together([member.groups for member in members.values()])
        generations = {rank: member.generation for rank, member in members.items()}
        left = self.verb("rebuild", everyone, meeting_at(*self.offer_place(), generations), specs)
        held = sorted({kind for kinds in left.values() for kind in kinds})
        if held:
            msg = (
                f"The process groups were made again, but the model still holds old ones "
                f"(in {', '.join(held)}), which fail when they are used. Load the model again."
            )
            raise ClusterError(msg)


def merged(errors: Mapping[int, FlexError]) -> FlexError:
    """One error out of those of several ranks; failures of user code are listed rank by rank."""
    first = errors[min(errors)]
    if not isinstance(first, UserCodeError):
        return first
    failures = tuple(f for e in errors.values() if isinstance(e, UserCodeError) for f in e.failures)
    return type(first)(str(first), failures)
