"""Asking ranks: submit a verb to one or all, wait, and watch that the replies can still come."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flexmagic.client import engine_side
from flexmagic.client.cluster import Cluster
from flexmagic.client.control import Control
from flexmagic.client.recovery import Freed, free, meeting_at, together, uninterrupted
from flexmagic.client.watching import SILENT, SILENT_AT_FIRST, Limits, Verdict, Watcher
from flexmagic.errors import ClusterError, EngineError, FlexError, StuckError, UserCodeError

GRACE = 5.0
"""Seconds in which what an engine published before its reply has arrived."""

QUIET, EVERY = 0.4, 0.2
"""Seconds before the first look at ranks that have not answered, and between looks."""

READING = {"check_model", "load_model", "build_model", "adopt_model"}
"""Verbs that may read libraries and weights from disk."""

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
        self._recovering = False

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self._views)

    def raw(self, function: Callable[..., Any], per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a plain function of :mod:`engine_side` on every rank with its own arguments."""
        pending = [
            view.apply_async(function, *args) for view, args in zip(self._views, per_rank, strict=True)
        ]
        return self._wait(dict(enumerate(pending)), None, SILENT_AT_FIRST)

    def raw_one(self, rank: int, function: Callable[..., Any], *args: Any) -> Any:
        """Run a plain function of :mod:`engine_side` on one rank."""
        return self._wait({rank: self._views[rank].apply_async(function, *args)}, None, SILENT_AT_FIRST)[0]

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

        self._refuse_if_ended(requests)
        packed: dict[int, bytes] = {}
        pending = {}
        with self._cluster.turns.turn():
            for rank, (verb, args, kwargs) in requests.items():
                payload = packed.setdefault(id(args), cloudpickle.dumps((args, kwargs)))
                with self._sending:  # a view asks on a thread of its own
                    pending[rank] = self._views[rank].apply_async(engine_side.call, verb, payload)
            try:
                reads = any(verb in READING for verb, _, _ in requests.values())
                replies = self._wait(pending, progress, SILENT_AT_FIRST if reads else SILENT)
            except StuckError as stuck:
                raise _cause(stuck) from stuck
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

    def _refuse_if_ended(self, ranks: Iterable[int]) -> None:
        gone = sorted(set(self.ended()) & set(ranks))
        if gone:
            words = self._cluster.last_words(gone)
            msg = f"The engine of rank {', '.join(map(str, gone))} has ended. {words}"
            raise EngineError(msg, tuple(gone))

    def cancel(self) -> None:
        """End what the ranks are working on, as an interrupt would; callable from any thread."""
        self._cancelled.set()

    def _wait(self, pending: dict[int, Any], progress: Progress | None, silent: float) -> list[Any]:
        """The ranks' replies; raises what kept them from coming, once all ranks can be asked again.

        ``silent``: seconds after which a rank that does not say where it is counts as frozen.
        """
        self._cancelled.clear()
        try:
            verdict = self._watch(pending, progress, SILENT if self._recovering else silent)
        except KeyboardInterrupt:
            with uninterrupted():
                places = self._places(pending)
                freed = self._recover(pending)
            msg = f"{places}\n{self._after(freed) or 'The engines are ready.'}"
            raise KeyboardInterrupt(msg) from None
        if verdict is not None and self._recovering:
            msg = f"{verdict}\nThe process groups could not be made again. Type %flexcluster recover."
            raise ClusterError(msg)
        if verdict is not None:
            with uninterrupted():
                freed = self._recover(pending)
            raise StuckError(verdict, self._said(pending), self._after(freed))
        return [self._value(rank, answer) for rank, answer in pending.items()]

    def _watch(self, pending: dict[int, Any], progress: Progress | None, silent: float) -> Verdict | None:
        """Wait for all answers, or for the certainty that they will not come."""
        started = time.perf_counter()
        limits = Limits() if self._recovering else self.limits  # what is to help is not cut short
        watcher = Watcher(limits, silent)
        looked = QUIET
        while waiting := _waiting(pending):
            pending[waiting[0]].wait(0.05)
            now = time.perf_counter() - started
            if self._cancelled.is_set() and not self._recovering:
                raise KeyboardInterrupt
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

    def _recover(self, pending: dict[int, Any]) -> Freed:
        """Free all ranks and make their process groups again, if all their engines live."""
        freed = free(self.control, lambda: _waiting(pending), range(self.world_size), self._end)
        if not freed.ended:
            self.rebuild()
        return freed

    def _after(self, freed: Freed) -> str:
        """What is to be said of ranks that could not be freed."""
        if not freed.ended:
            return ""
        who = ", ".join(map(str, freed.ended))
        words = self._cluster.last_words(freed.ended)
        return f"The engine of rank {who} could not be interrupted and was ended. {words}"

    def _end(self, rank: int) -> None:
        self._cluster.end(self.engines[rank])

    def rebuild(self) -> None:
        """Make all process groups again, in a new generation; nothing happens while an engine is missing.

        Raises :class:`ClusterError` if that does not succeed.
        """
        with self._cluster.turns.turn():
            self._recovering = True
            try:
                self._rebuild()
            finally:
                self._recovering = False

    def _rebuild(self) -> None:
        if self.ended():
            return
        members = [reply.value for reply in self.plain("groups")]
        generations = {rank: member.generation for rank, member in enumerate(members)}
        specs = together([member.groups for member in members])
        meeting = meeting_at(*self.offer_place(), generations)
        left = [reply.value for reply in self.plain("rebuild", meeting, specs)]
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

    def plain(self, verb: str, *args: Any) -> list[Any]:
        """The replies of all ranks to a verb, without any of the care that :meth:`all` takes."""
        import cloudpickle

        payload = cloudpickle.dumps((args, {}))
        replies = self.raw(engine_side.call, [(verb, payload)] * self.world_size)
        errors = {rank: reply.error for rank, reply in enumerate(replies) if reply.error is not None}
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
                words = self._cluster.last_words([rank])
                msg = f"The engine of rank {rank} ended while it was working. {words}"
                raise EngineError(msg, (rank,)) from error
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


def _cause(stuck: StuckError) -> FlexError:
    """What ranks that had answered refused with, if they did: the others waited for them; else ``stuck``."""
    said = {rank: stuck.said[rank] for rank in stuck.verdict.answered if rank in stuck.said}
    errors = {rank: reply.error for rank, reply in said.items() if getattr(reply, "error", None)}
    if not errors:
        return stuck
    error = merged(errors)
    error.args = (f"{error}\n{stuck.verdict.meanwhile}",)
    return error


def merged(errors: dict[int, FlexError]) -> FlexError:
    """One error out of those of several ranks; failures of user code are listed rank by rank."""
    first = errors[min(errors)]
    if not isinstance(first, UserCodeError):
        return first
    failures = tuple(f for e in errors.values() if isinstance(e, UserCodeError) for f in e.failures)
    return type(first)(str(first), failures)
