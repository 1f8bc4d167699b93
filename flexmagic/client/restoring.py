"""Putting a cluster in order: ranks freed, engines that ended replaced, their part of the model reloaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.client import engine_side
from flexmagic.client.calls import Calls
from flexmagic.client.cluster import Cluster
from flexmagic.client.hook_book import HookBook
from flexmagic.client.model import Model
from flexmagic.client.recovery import PATIENCE, Freed, free, meeting_at, together
from flexmagic.errors import ClusterError, FlexError

if TYPE_CHECKING:
    from flexmagic.engine.origin import Origin

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recovered:
    """What a recovery did: one line for each step, and what was lost; the ranks with another engine now."""

    lines: tuple[str, ...]
    seconds: float
    replaced: tuple[int, ...] = ()

    def __repr__(self) -> str:
        """The lines."""
        return "\n".join(self.lines)


class Restoring:
    """Recovers one session's cluster. ``settle``: leaves with new engines what is known of the session."""

    def __init__(self, calls: Calls, cluster: Cluster, hooks: HookBook) -> None:
        self._calls = calls
        self._cluster = cluster
        self._hooks = hooks
        self.settle: Callable[[], None] = lambda: None
        calls.renewed = self._replaced_by_others

    def _replaced_by_others(self, ranks: Sequence[int]) -> None:
        """Give engines that another notebook has started again what they must know of this one."""
        self._calls.ranks.seats = [*self._calls.groups.everywhere(engine_side.seat)]
        self.define(ranks)
        self.settle()

    def recover(self, model: Model | None, say: Say, *, force: bool) -> Recovered:
        """Do what is needed, nothing if nothing is wrong; ``force``: make the groups again anyway.

        Raises :class:`ClusterError` or :class:`ModelError` with the survivors as they were if the lost
        part of the model cannot be had again.
        """
        started = time.perf_counter()
        busy = self._busy(self._calls.ranks.alive())
        lines: list[str] = []
        with self._cluster.turns.turn():
            dead, alive = self._calls.ended(), self._calls.ranks.alive()
            if busy := [rank for rank in busy if rank in alive]:
                say(f"freeing rank {_listed(busy)}")
                freed = self._freed(alive, self._busy)
                lines.append(f"Rank {_listed(busy)} was busy and is free again.")
                dead = tuple(sorted({*dead, *freed.ended}))
            if dead:
                lines += self._replace(dead, model, say)
            elif busy or force:
                self._calls.rebuild()
                lines.append("The process groups were made again.")
        if not lines:
            lines = [f"Nothing to recover: all {len(alive)} engines are idle."]
        return Recovered(tuple(lines), time.perf_counter() - started, dead)

    def define(self, ranks: Sequence[int]) -> None:
        """Register all hooks on engines that are new."""
        for version in (version for hook in self._hooks for version in hook.history):
            self._calls.some({rank: ("define_hook", (version.source,), {}) for rank in ranks})

    def at_work(self, ranks: Sequence[int]) -> list[int]:
        """The ranks that say they are working on a call of a session."""
        places = self._calls.ranks.control.look(ranks, PATIENCE)
        return [rank for rank, p in places.items() if p is not None and p.kind not in {"idle", "other code"}]

    def free(self, ranks: Sequence[int]) -> None:
        """Free ranks, but make no groups again."""
        self._freed(ranks, self.at_work)

    def _freed(self, ranks: Sequence[int], busy: Callable[[Sequence[int]], list[int]]) -> Freed:
        return free(self._calls.ranks.control, lambda: busy(ranks), ranks, self._calls.ranks.end)

    def _busy(self, ranks: Sequence[int]) -> list[int]:
        places = self._calls.ranks.control.look(ranks, PATIENCE)
        return [rank for rank, place in places.items() if place is None or place.kind != "idle"]

    def _replace(self, dead: Sequence[int], model: Model | None, say: Say) -> list[str]:
        alive = [rank for rank in range(self._calls.world_size) if rank not in dead]
        origin, edited = self._origin(alive) if alive else (None, set[str]())
        say(f"starting rank {_listed(dead)} again")
        self._cluster.replace(dead)
        self._calls.ranks.renew(dead)
        self._calls.groups.prepare(dead)
        say("connecting the ranks")
        self._join(alive, dead)
        lines = [f"Rank {_listed(dead)} was started again under its id."]
        if origin is None:
            if model is not None:
                model.alive = False
                lines.append("No rank that knew the model is left: load it again.")
            return lines
        say(f"loading the model's part of rank {_listed(dead)}")
        lines += self._reload(origin, dead, model)
        self.define(dead)
        if edited and not origin.rerun:
            some = ", ".join(sorted(edited)[:3]) + (", …" if len(edited) > 3 else "")
            lines.append(
                f"Lost: changes made to parameters since they were loaded, on rank {_listed(dead)} ({some})."
            )
        return [*lines, f"Captures of earlier runs are lost on rank {_listed(dead)}; the others keep theirs."]

    def _origin(self, alive: Sequence[int]) -> tuple[Origin | None, set[str]]:
        """How the model was made, and which parameters were written into since, after checking the source."""
        answers = self._calls.some({rank: ("origin", (), {}) for rank in alive})
        found = [origin for origin, _ in answers.values() if origin is not None]
        if not found:
            return None, set()
        if found[0].spec is not None:
            try:
                self._calls.one(alive[0], "check_model", found[0].spec)
            except FlexError as error:
                msg = (
                    f"The part of the model that was lost cannot be loaded again: {error}\n"
                    "The other engines are as they were."
                )
                raise ClusterError(msg) from None
        groups = tuple(dict.fromkeys(name for origin in found for name in origin.groups))
        return found[0].with_groups(groups), set[str]().union(*(edited for _, edited in answers.values()))

    def _join(self, alive: Sequence[int], dead: Sequence[int]) -> None:
        """Make all groups again, with the new engines in the places of those that ended."""
        members = self._calls.groups.verb("groups", alive)
        specs = together([member.groups for member in members.values()])
        meeting = meeting_at(
            *self._calls.groups.offer_place(), {rank: member.generation for rank, member in members.items()}
        )
        size = self._calls.world_size
        requests: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {
            rank: (engine_side.join, (rank, size, meeting, specs)) for rank in dead
        }
        payload = engine_side.packed((meeting, specs))
        requests |= dict.fromkeys(alive, (engine_side.call, ("rebuild", payload)))
        replies = self._calls.groups.each(requests)
        for rank, reply in replies.items():
            if rank in dead:
                self._calls.ranks.seats[rank] = reply
            elif reply.error is not None:
                raise reply.error

    def _reload(self, origin: Origin, dead: Sequence[int], model: Model | None) -> list[str]:
        """Make the lost parts of the model again and survey it, even if it is not known here yet."""
        lines = []
        if origin.rerun:
            self._calls.all("rerun", origin)
            lines.append("The model's cell was run again on every rank.")
        else:
            self._calls.some({rank: ("reload", (origin, tuple(dead)), {}) for rank in dead})
            lines.append(f"Its part of the model was loaded again from {origin.source}.")
        reports = self._calls.all("readopt_model")
        if model is not None:
            model.update(reports)
        return lines


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
