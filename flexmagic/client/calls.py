"""Asking ranks: submit a verb to one or all, wait, and bring all ranks back whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client import engine_side
from flexmagic.client.bundle import bundle_of, bundled
from flexmagic.client.cluster import Cluster
from flexmagic.client.gathering import gathering
from flexmagic.client.mail import Answer
from flexmagic.client.ranks import RECOVER, Ranks
from flexmagic.client.recovery import Freed, postponed, uninterrupted
from flexmagic.client.regroup import Regroup, merged
from flexmagic.client.straight import Straight
from flexmagic.client.waiting import Pending, Progress, Waiting
from flexmagic.client.watching import SILENT, SILENT_AT_FIRST
from flexmagic.errors import READY, EngineError, FlexError, StuckError

if TYPE_CHECKING:
    from flexmagic.client.wire import Arriving

READING = {
    "check_model", "load_model", "build_model", "adopt_model", "reload", "rerun", "readopt_model",
}  # fmt: skip
"""Verbs that may read libraries and weights from disk."""


Requests = Mapping[int, tuple[str, Any, Any]]
"""A verb, its arguments and its keyword arguments, by rank."""


class Calls:
    """Verb calls to the ranks of a cluster.

    A call always comes back: ranks that can no longer meet are freed, and their process groups made
    again, before the error is raised. ``mend``: puts engines that ended meanwhile in order again and says
    what that did; ``mends``: whether it is to. ``unreachable``: see :class:`~flexmagic.client.wire.Line`.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.ranks = Ranks(cluster)
        self.waiting = Waiting(self.ranks)
        self.groups = Regroup(self.ranks, self.waiting)
        self.mend: Callable[[], str] | None = None
        self.mends = True
        self.renewed: Callable[[Sequence[int]], None] = lambda _ranks: None
        self.unreachable: set[str] = set()
        self._turns = cluster.turns

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.ranks.world_size

    @property
    def lives(self) -> list[int]:
        """How often each rank's engine was replaced."""
        return self.ranks.lives

    def ended(self) -> tuple[int, ...]:
        """The ranks whose engine is gone, as far as is known here; asks nobody."""
        return self.ranks.ended()

    def gone(self, lives: Sequence[int]) -> tuple[int, ...]:
        """The ranks that no longer hold what they held when :attr:`lives` was this."""
        return self.ranks.gone(lives)

    def one(self, rank: int, verb: str, *args: Any, **kwargs: Any) -> Any:
        """A verb on one rank; raises what it refuses with."""
        return self.some({rank: (verb, args, kwargs)})[rank]

    def all(self, verb: str, *args: Any, progress: Progress | None = None, **kwargs: Any) -> list[Any]:
        """The same verb on every rank; results in rank order, or the first refusal raised."""
        out = self.some(dict.fromkeys(range(self.world_size), (verb, args, kwargs)), progress)
        return [out[rank] for rank in range(self.world_size)]

    def post(self, rank: int, verb: str, *args: Any) -> None:
        """A verb on one rank, whose answer nobody waits for; an engine that is gone is not told."""
        if (bundle := bundled(self)) is not None:
            bundle.add(rank, verb, args)
            return
        self._send(rank, verb, args)

    def post_all(self, verb: str, *args: Any) -> None:
        """The same on every rank."""
        for rank in range(self.world_size):
            self.post(rank, verb, *args)

    @contextlib.contextmanager
    def bundling(self) -> Iterator[None]:
        """In a block, what this thread posts to a rank goes there in few messages, at the block's end."""
        with bundle_of(self, self._send):
            yield

    def _send(self, rank: int, verb: str, args: Any) -> None:
        with contextlib.suppress(Exception):
            self.ranks.call(rank, verb, engine_side.packed(args), answer=False)

    def some(self, requests: Requests, progress: Progress | None = None) -> dict[int, Any]:
        """Different verbs on different ranks at once.

        Raises what ranks refuse with; :class:`StuckError` if they cannot meet;
        :class:`KeyboardInterrupt`, all ranks being ready again, if the user interrupts.
        """
        if (together := gathering(self)) is not None:
            return together.ask(requests)
        self.ranks.refuse_if_ended(requests)
        with self._turns.turn(self.waiting.for_turn(progress)):
            self._renew()
            try:
                replies = self._answers(requests, progress)
            except StuckError as stuck:
                raise _cause(stuck) from stuck
            errors = {rank: reply.error for rank, reply in replies.items() if reply.error}
            if errors and len(errors) < len(replies):
                self.rebuild()  # a rank that gave up alone may have left half a message behind
        if errors:
            raise merged(errors)
        return {rank: reply.value for rank, reply in replies.items()}

    def _renew(self) -> None:
        """Make known to engines that others have replaced what this session has there."""
        if not (replaced := self.ranks.replaced()):
            return
        try:
            self.renewed(replaced)
        except BaseException:
            self.ranks.ranks_ended(tuple(replaced))  # to be done with the next call
            raise

    @contextlib.contextmanager
    def arriving(self, what: str, progress: Arriving | None) -> Iterator[Arriving | None]:
        """Who hears of something as it arrives: ``progress``, else who is told of all that takes long."""
        if progress is not None or self.waiting.attending is None:
            yield progress
            return
        with self.waiting.attending.gathering(what) as heard:
            yield heard

    def connect(self) -> None:
        """Take up straight lines to the engines of this machine that have none."""
        from flexmagic.engine import segments

        new = [rank for rank in self.ranks.alive() if self.ranks.lines.of(rank) is None]
        said = self.groups.each(dict.fromkeys(new, (engine_side.straight, ())))
        for rank, (machine, name) in said.items():
            if name and machine == segments.machine():
                self.ranks.lines.connect(rank, name)

    def rebuild(self) -> None:
        """Make all process groups again; see :meth:`Regroup.rebuild`."""
        with self._turns.turn():
            self.groups.rebuild()

    def _ask(self, requests: Requests) -> Pending:
        packed: dict[int, bytes] = {}
        pending: dict[int, Answer | Straight] = {}
        for rank, (verb, args, kwargs) in requests.items():
            payload = packed.setdefault(id(args), engine_side.packed(args, kwargs))
            pending[rank] = self.ranks.call(rank, verb, payload)
        return pending

    def _answers(self, requests: Requests, progress: Progress | None) -> dict[int, Any]:
        """The ranks' replies; raises what kept them from coming, once all ranks can be asked again."""
        silent = SILENT_AT_FIRST if any(verb in READING for verb, _, _ in requests.values()) else SILENT
        pending: Pending = {}
        try:
            with postponed():
                pending = self._ask(requests)
            verb = next((verb for verb, _, _ in requests.values()), "")
            verdict = self.waiting.watch(pending, progress=progress, silent=silent, verb=verb)
        except KeyboardInterrupt:
            with uninterrupted():
                places = self.waiting.places(pending)
                freed = self._recover(pending)
            msg = f"{places}\n{self._after(freed) or 'The engines are ready.'}"
            raise KeyboardInterrupt(msg) from None
        if verdict is not None:
            with uninterrupted():
                freed = self._recover(pending)
            said = self.waiting.said(pending)
            raise StuckError(verdict, said, self._after(freed))
        return {rank: self.ranks.value(rank, answer) for rank, answer in pending.items()}

    def _recover(self, pending: Pending) -> Freed:
        """Free all ranks and make their process groups again, if all their engines live."""
        freed = self.waiting.free(pending)
        if not freed.ended:
            try:
                self.groups.rebuild()
            except (EngineError, StuckError):
                if not self.ranks.ended():
                    raise
        return freed

    def _after(self, freed: Freed) -> str:
        """What is to be said of engines that were lost when all were freed, and of what was done about it."""
        lost = sorted({*freed.ended, *self.ranks.ended()})
        if not lost:
            return ""
        how = "could not be interrupted and was ended" if freed.ended else "has ended"
        who = ", ".join(map(str, lost))
        told = "\n".join([f"The engine of rank {who} {how}.", *self.ranks.cluster.last_words(lost), ""])
        if self.mend is None or not self.mends:
            return told + RECOVER
        mend, self.mend = self.mend, None  # not again for what goes wrong meanwhile
        try:
            return told + mend()
        except FlexError as error:
            return f"{told}It could not be put in order by itself: {error}\n{RECOVER}"
        except KeyboardInterrupt:
            return f"{told}Putting it in order was interrupted. {RECOVER}"
        finally:
            self.mend = mend


def _cause(stuck: StuckError) -> FlexError:
    """What ranks that had answered refused with, if they did: the others waited for them; else ``stuck``."""
    said = {rank: stuck.said[rank] for rank in stuck.verdict.answered if rank in stuck.said}
    errors = {rank: reply.error for rank, reply in said.items() if getattr(reply, "error", None)}
    if not errors:
        return stuck
    error = merged(errors)
    after = "" if stuck.after == READY else f"\n{stuck.after}"
    error.args = (f"{error}\n{stuck.verdict.meanwhile}{after}",)
    return error
