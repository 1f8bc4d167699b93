"""Asking ranks: submit a verb to one or all, wait, and watch that the replies can still come."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.client import engine_side
from flexmagic.client.cluster import Cluster
from flexmagic.client.control import Control
from flexmagic.client.recovery import free, meeting_at, together, uninterrupted
from flexmagic.client.watching import Limits, Verdict, Watcher
from flexmagic.errors import ClusterError, EngineError, FlexError, StuckError, UserCodeError

if TYPE_CHECKING:
    from flexmagic.engine.verbs import Seat

GRACE = 5.0
"""Seconds in which what an engine published before its reply has arrived."""

QUIET, EVERY = 0.4, 0.2
"""Seconds before the first look at ranks that have not answered, and between looks."""

IMPORTED = 120.0
"""Seconds in which an engine must have imported torch."""

LOOK_PATIENCE = 0.5
"""Seconds that a rank gets to say where it is."""


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
    """Verb calls to the ranks of a cluster; rank ``r`` is the ``r``-th engine.

    A call always comes back: ranks that can no longer meet are freed, and their process groups made
    again, before the error is raised.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.engines = cluster.engines
        self.control = Control(cluster, self.engines)
        self.limits = Limits()
        self._views = [cluster.client[engine] for engine in self.engines]
        self._sending = threading.Lock()
        self._cancelled = threading.Event()
        self.lives = [0] * len(self.engines)
        self.seats: list[Seat] = []

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self._views)

    def raw(self, function: Callable[..., Any], per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a plain function of :mod:`engine_side` on every rank with its own arguments."""
        said = self.raw_each({rank: (function, args) for rank, args in enumerate(per_rank)})
        return [said[rank] for rank in range(self.world_size)]

    def raw_one(self, rank: int, function: Callable[..., Any], *args: Any) -> Any:
        """Run a plain function of :mod:`engine_side` on one rank."""
        return self.raw_each({rank: (function, args)})[rank]

    def raw_each(self, requests: Mapping[int, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict[int, Any]:
        """Run plain functions of :mod:`engine_side`, another on each rank, at once.

        Ranks that wait in vain are freed, but no groups are made again: this is what makes them.
        """
        return self._raw(requests, self.limits)

    def prepare(self, ranks: Iterable[int]) -> None:
        """Have engines import what they need, which takes seconds in which they may say nothing."""
        self._raw(dict.fromkeys(ranks, (engine_side.prepare, ())), Limits(silent=IMPORTED))

    def _raw(
        self, requests: Mapping[int, tuple[Callable[..., Any], tuple[Any, ...]]], limits: Limits
    ) -> dict[int, Any]:
        with self._sending:
            pending = {
                rank: self._views[rank].apply_async(function, *args)
                for rank, (function, args) in requests.items()
            }
        verdict = self._watch(pending, None, limits)
        if verdict is not None:
            self._free(pending)
            raise StuckError(verdict, self._said(pending), "Type %flexcluster recover.")
        return {rank: self._value(rank, answer) for rank, answer in pending.items()}

    def one(self, rank: int, verb: str, *args: Any, **kwargs: Any) -> Any:
        """A verb on one rank; raises what it refuses with."""
        return self.some({rank: (verb, args, kwargs)})[rank]

    def all(self, verb: str, *args: Any, progress: Progress | None = None, **kwargs: Any) -> list[Any]:
        """The same verb on every rank; results in rank order, or the first refusal raised."""
        out = self.some(dict.fromkeys(range(self.world_size), (verb, args, kwargs)), progress)
        return [out[rank] for rank in range(self.world_size)]

    def post(self, rank: int, verb: str, *args: Any) -> None:
        """A verb on one rank, whose answer nobody waits for; an engine that is gone is not told."""
        with self._sending, contextlib.suppress(Exception):
            self._views[rank].apply_async(engine_side.call, verb, engine_side.packed(args))

    def some(
        self, requests: dict[int, tuple[str, Any, Any]], progress: Progress | None = None
    ) -> dict[int, Any]:
        """Different verbs on different ranks at once."""
        self._refuse_if_ended(requests)
        packed: dict[int, bytes] = {}
        pending = {}
        with self._cluster.turns.turn():
            for rank, (verb, args, kwargs) in requests.items():
                payload = packed.setdefault(id(args), engine_side.packed(args, kwargs))
                with self._sending:  # a view asks on a thread of its own
                    pending[rank] = self._views[rank].apply_async(engine_side.call, verb, payload)
            replies = self._wait(pending, progress)
            errors = {r: reply.error for r, reply in zip(pending, replies, strict=True) if reply.error}
            if errors and len(errors) < len(pending):
                self.rebuild()  # a rank that gave up alone may have left half a message behind
        if errors:
            raise merged(errors)
        return {rank: r.value for rank, r in zip(pending, replies, strict=True)}

    def ended(self) -> tuple[int, ...]:
        """The ranks whose engine is gone, as far as is known here; asks nobody."""
        alive = set(self._cluster.engines)
        return tuple(rank for rank, engine in enumerate(self.engines) if engine not in alive)

    def _refuse_if_ended(self, ranks: Iterable[int]) -> None:
        gone = sorted(set(self.ended()) & set(ranks))
        if gone:
            raise self._ended(gone)

    def _ended(self, ranks: Sequence[int]) -> EngineError:
        words = self._cluster.last_words(ranks)
        return EngineError(
            f"The engine of rank {', '.join(map(str, ranks))} has ended. {words}", tuple(ranks)
        )

    def cancel(self) -> None:
        """End what the ranks are working on, as an interrupt would; callable from any thread."""
        self._cancelled.set()

    def _wait(self, pending: dict[int, Any], progress: Progress | None) -> list[Any]:
        """The ranks' replies; raises what kept them from coming, once all ranks can be asked again."""
        self._cancelled.clear()
        try:
            verdict = self._watch(pending, progress, self.limits)
        except KeyboardInterrupt:
            with uninterrupted():
                places = self._places(pending)
                self._recover(pending)
            msg = f"{places}\nThe engines are ready."
            raise KeyboardInterrupt(msg) from None
        if verdict is not None:
            said = self._said(pending)  # what comes later is only the cut's doing
            with uninterrupted():
                self._recover(pending)
            errors = {rank: reply.error for rank, reply in said.items() if getattr(reply, "error", None)}
            stuck = StuckError(verdict, said)
            if errors:  # that is what the others waited for
                raise merged(errors) from stuck
            raise stuck
        return [self._value(rank, answer) for rank, answer in pending.items()]

    def _watch(self, pending: dict[int, Any], progress: Progress | None, limits: Limits) -> Verdict | None:
        """Wait for all answers, or for the certainty that they will not come."""
        started = time.perf_counter()
        watcher, looked = Watcher(limits), QUIET
        while waiting := _waiting(pending):
            pending[waiting[0]].wait(0.05)
            now = time.perf_counter() - started
            if self._cancelled.is_set():
                raise KeyboardInterrupt
            if gone := sorted(set(self.ended()) & set(pending)):
                self._free({rank: answer for rank, answer in pending.items() if rank not in gone})
                raise self._ended(gone)
            if progress is not None:
                progress(Waited(now, _how_far(pending)))
            if now > looked and (waiting := _waiting(pending)):
                self._cluster.check_controller()
                places = self.control.look(waiting, LOOK_PATIENCE)
                answered = [rank for rank in pending if rank not in places]
                verdict = watcher.see(now, answered, places)
                if verdict is not None and _waiting(pending):
                    return verdict
                looked = time.perf_counter() - started + EVERY
        if progress is not None:
            for answer in pending.values():
                if not _refused(answer):
                    answer.wait_for_output(GRACE)  # a reply can overtake what was said before it
            progress(Waited(time.perf_counter() - started, _how_far(pending)))
        return None

    def _places(self, pending: dict[int, Any]) -> str:
        """Where every rank was, as text."""
        places = self.control.look(_waiting(pending), LOOK_PATIENCE)
        return str(Verdict("Interrupted.", places, frozenset(set(pending) - set(places))))

    def _recover(self, pending: dict[int, Any]) -> None:
        """Free all ranks and make their process groups again, as far as their engines live."""
        self._free(pending)
        self.rebuild()

    def _free(self, pending: dict[int, Any]) -> None:
        alive = [rank for rank in range(self.world_size) if rank not in self.ended()]
        free(self.control, lambda: _waiting(pending), alive, self.end)

    def end(self, rank: int) -> None:
        """End the process of a rank that nothing else brings back."""
        self._cluster.end(self.engines[rank])

    def renew(self, ranks: Iterable[int]) -> None:
        """Note that engines were replaced: what runs left on them until now is gone."""
        for rank in ranks:
            self.lives[rank] += 1

    def gone(self, lives: Sequence[int]) -> tuple[int, ...]:
        """The ranks that no longer hold what they held when :attr:`lives` was this."""
        renewed = [rank for rank, life in enumerate(lives) if life != self.lives[rank]]
        return tuple(sorted({*renewed, *self.ended()}))

    def rebuild(self) -> None:
        """Make all process groups again, in a new generation; nothing happens while an engine is missing.

        Raises :class:`ClusterError` if that does not succeed.
        """
        if self.ended():
            return
        everyone = range(self.world_size)
        members = [reply.value for reply in self.plainly("groups", everyone).values()]
        generations = {rank: member.generation for rank, member in enumerate(members)}
        specs = together([member.groups for member in members])
        meeting = meeting_at(*self.offer_place(), generations)
        left = [reply.value for reply in self.plainly("rebuild", everyone, meeting, specs).values()]
        held = sorted({kind for kinds in left for kind in kinds})
        if held:
            msg = (
                f"The process groups were made again, but the model still holds old ones "
                f"(in {', '.join(held)}), which fail when they are used. Load the model again."
            )
            raise ClusterError(msg)

    def offer_place(self) -> tuple[str, int]:
        """A host and a free port on it where rank 0 can serve a store that all ranks reach."""
        hosts = self.raw(engine_side.host_name, [()] * self.world_size)
        host = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
        return host, self.raw_one(0, engine_side.offer_port, host)

    def plainly(self, verb: str, ranks: Iterable[int], *args: Any) -> dict[int, Any]:
        """The replies of ranks to a verb, without any of the care that :meth:`some` takes."""
        payload = engine_side.packed(args)
        replies = self.raw_each(dict.fromkeys(ranks, (engine_side.call, (verb, payload))))
        errors = {rank: reply.error for rank, reply in replies.items() if reply.error is not None}
        if errors:
            raise merged(errors)
        return replies

    def _said(self, pending: dict[int, Any]) -> dict[int, Any]:
        """What the ranks replied that replied at all."""
        said = {}
        for rank, answer in pending.items():
            with contextlib.suppress(FlexError):
                if answer.ready():
                    said[rank] = self._value(rank, answer)
        return said

    def _value(self, rank: int, answer: Any) -> Any:
        try:
            return answer.get(0)
        except Exception as error:
            text = str(error)
            if "died" in text or "stopped" in text:
                raise self._ended([rank]) from error
            msg = f"Rank {rank} could not answer: {text}"
            raise ClusterError(msg) from error


def _waiting(pending: dict[int, Any]) -> list[int]:
    return [rank for rank, answer in pending.items() if not answer.ready()]


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
