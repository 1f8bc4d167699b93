"""Asking ranks: submit a verb to one or all, wait for the first refusal rather than for all replies."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flexmagic.client import engine_side
from flexmagic.client.cluster import Cluster
from flexmagic.errors import ClusterError, FlexError, UserCodeError

GRACE = 5.0
"""Seconds that the other ranks get to answer once one rank has refused."""


@dataclass(frozen=True)
class Waited:
    """How long a call has taken by now, and how far ranks say they are: what, done, out of how many."""

    seconds: float
    ranks: dict[int, tuple[str, int, int]]

    def __str__(self) -> str:
        """``3.2 s: loading weights, rank 0 12/39, rank 1 10/39``."""
        told = [f"rank {rank} {done}/{total}" for rank, (_, done, total) in sorted(self.ranks.items())]
        what = next((what for what, _, _ in self.ranks.values()), "")
        return f"{self.seconds:.1f} s" + (f": {what}, {', '.join(told)}" if told else "")


Progress = Callable[[Waited], None]
"""Called a few times a second while a call is waited for."""


class Calls:
    """Verb calls to the ranks of a cluster; rank ``r`` is the ``r``-th engine."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.engines = cluster.engines
        self._views = [cluster.client[engine] for engine in self.engines]
        self._sending = threading.Lock()
        self.stuck: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self._views)

    def raw(self, function: Callable[..., Any], per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a plain function of :mod:`engine_side` on every rank with its own arguments."""
        pending = [
            view.apply_async(function, *args) for view, args in zip(self._views, per_rank, strict=True)
        ]
        return self._wait(dict(enumerate(pending)), None)

    def raw_one(self, rank: int, function: Callable[..., Any], *args: Any) -> Any:
        """Run a plain function of :mod:`engine_side` on one rank."""
        return self._wait({rank: self._views[rank].apply_async(function, *args)}, None)[0]

    def one(self, rank: int, verb: str, *args: Any, **kwargs: Any) -> Any:
        """A verb on one rank; raises what it refuses with."""
        return self.some({rank: (verb, args, kwargs)})[rank]

    def all(self, verb: str, *args: Any, progress: Progress | None = None, **kwargs: Any) -> list[Any]:
        """The same verb on every rank; results in rank order, or the first refusal raised."""
        out = self.some(dict.fromkeys(range(self.world_size), (verb, args, kwargs)), progress)
        return [out[rank] for rank in range(self.world_size)]

    def some(
        self, requests: dict[int, tuple[str, Any, Any]], progress: Progress | None = None
    ) -> dict[int, Any]:
        """Different verbs on different ranks at once."""
        import cloudpickle

        self._refuse_if_stuck()
        self._refuse_if_ended(requests)
        packed: dict[int, bytes] = {}
        pending = {}
        for rank, (verb, args, kwargs) in requests.items():
            payload = packed.setdefault(id(args), cloudpickle.dumps((args, kwargs)))
            with self._sending:  # a view asks on a thread of its own
                pending[rank] = self._views[rank].apply_async(engine_side.call, verb, payload)
        replies = self._wait(pending, progress)
        errors = {rank: r.error for rank, r in zip(pending, replies, strict=True) if r.error is not None}
        if errors:
            raise merged(errors)
        return {rank: r.value for rank, r in zip(pending, replies, strict=True)}

    def ended(self) -> tuple[int, ...]:
        """The ranks whose engine is gone, as far as is known here; asks nobody."""
        alive = set(self._cluster.engines)
        return tuple(rank for rank, engine in enumerate(self.engines) if engine not in alive)

    def poll(self, verb: str, patience: float) -> list[tuple[str, Any]]:
        """A verb without arguments on every rank that can answer now: its state and its answer.

        The state is ``idle``, ``busy`` for a rank that said nothing within ``patience`` seconds, or
        ``ended``; the answer is ``None`` for those.
        """
        import cloudpickle

        payload = cloudpickle.dumps(((), {}))
        gone = self.ended()
        pending = {
            rank: view.apply_async(engine_side.call, verb, payload)
            for rank, view in enumerate(self._views)
            if rank not in gone
        }
        deadline = time.perf_counter() + patience
        out: list[tuple[str, Any]] = []
        for rank in range(self.world_size):
            if rank not in pending:
                out.append(("ended", None))
                continue
            pending[rank].wait(max(deadline - time.perf_counter(), 0))
            if not pending[rank].ready():
                out.append(("busy", None))
            elif _refused(pending[rank]):
                out.append(("ended", None))
            else:
                out.append(("idle", pending[rank].get(0).value))
        return out

    def _refuse_if_stuck(self) -> None:
        if self.stuck:
            ranks = ", ".join(map(str, self.stuck))
            msg = (
                f"Rank {ranks} has not come back from an earlier call, so nothing can run. "
                "Type %flexcluster stop, then start again."
            )
            raise ClusterError(msg)

    def _refuse_if_ended(self, ranks: Iterable[int]) -> None:
        gone = sorted(set(self.ended()) & set(ranks))
        if gone:
            msg = (
                f"The engine of rank {', '.join(map(str, gone))} has ended. Its log is in "
                f"{self._cluster.log_folder}. Type %flexcluster stop, then start again."
            )
            raise ClusterError(msg)

    def _wait(self, pending: dict[int, Any], progress: Progress | None) -> list[Any]:
        started = time.perf_counter()
        refused_at: float | None = None
        try:
            while waiting := [rank for rank, answer in pending.items() if not answer.ready()]:
                pending[waiting[0]].wait(0.05)
                if progress is not None:
                    progress(Waited(time.perf_counter() - started, _how_far(pending)))
                if refused_at is None and any(_refused(a) for a in pending.values()):
                    refused_at = time.perf_counter()
                if refused_at is not None and time.perf_counter() - refused_at > GRACE:
                    self._give_up(pending, waiting)
        except KeyboardInterrupt:
            self._interrupt(pending)
            raise
        if progress is not None:
            for answer in pending.values():
                if not _refused(answer):
                    answer.wait_for_output(GRACE)  # a reply can overtake what was said before it
            progress(Waited(time.perf_counter() - started, _how_far(pending)))
        return [self._value(rank, answer) for rank, answer in pending.items()]

    def _give_up(self, pending: dict[int, Any], waiting: list[int]) -> None:
        self.stuck = tuple(waiting)
        errors = {}
        for rank, answer in pending.items():
            if rank not in waiting:
                reply = self._value(rank, answer)
                if getattr(reply, "error", None) is not None:
                    errors[rank] = reply.error
        first = merged(errors)
        ranks = ", ".join(map(str, waiting))
        msg = (
            f"{first}\nRank {ranks} is still waiting for the others {GRACE:.0f} s later, most likely in a "
            "collective. Type %flexcluster stop, then start again."
        )
        raise ClusterError(msg)

    def _interrupt(self, pending: dict[int, Any]) -> None:
        self._cluster.interrupt()
        deadline = time.perf_counter() + GRACE
        while time.perf_counter() < deadline:
            waiting = [rank for rank, answer in pending.items() if not answer.ready()]
            if not waiting:
                return
            with contextlib.suppress(Exception):
                pending[waiting[0]].wait(0.05)
        self.stuck = tuple(rank for rank, answer in pending.items() if not answer.ready())

    def _value(self, rank: int, answer: Any) -> Any:
        try:
            return answer.get(0)
        except Exception as error:
            text = str(error)
            if "died" in text or "stopped" in text:
                msg = (
                    f"The engine of rank {rank} ended while it was working. Its log is in "
                    f"{self._cluster.log_folder}. Type %flexcluster stop, then start again."
                )
            else:
                msg = f"Rank {rank} could not answer: {text}"
            raise ClusterError(msg) from error


def _how_far(pending: dict[int, Any]) -> dict[int, tuple[str, int, int]]:
    """What the ranks have said last of how far they are."""
    told = {rank: answer.data for rank, answer in pending.items()}
    return {rank: data[engine_side.PROGRESS] for rank, data in told.items() if engine_side.PROGRESS in data}


def _refused(answer: Any) -> bool:
    if not answer.ready():
        return False
    try:
        return getattr(answer.get(0), "error", None) is not None
    except Exception:  # noqa: BLE001 - any remote exception counts as a refusal
        return True


def merged(errors: dict[int, FlexError]) -> FlexError:
    """One error out of those of several ranks; failures of user code are listed rank by rank."""
    first = errors[min(errors)]
    if not isinstance(first, UserCodeError):
        return first
    failures = tuple(f for e in errors.values() if isinstance(e, UserCodeError) for f in e.failures)
    return type(first)(str(first), failures)
