"""A session: one notebook or script, one cluster, one model, its hooks and runs."""

from __future__ import annotations

import atexit
import contextlib
import uuid
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flexmagic.client import engine_side
from flexmagic.client.calls import Calls
from flexmagic.client.cells import Cells
from flexmagic.client.cluster import Cluster
from flexmagic.client.hook_book import HookBook
from flexmagic.client.hooks import Hook
from flexmagic.client.known import Known
from flexmagic.client.loading import Loading
from flexmagic.client.losses import Losses
from flexmagic.client.model import Model
from flexmagic.client.modules import Modules
from flexmagic.client.persistent import Persistent
from flexmagic.client.ranks import RECOVER
from flexmagic.client.recovery import meeting_at
from flexmagic.client.restoring import Recovered, Restoring
from flexmagic.client.running import Running
from flexmagic.client.status import status_table
from flexmagic.client.table import Table
from flexmagic.client.waiting import Progress
from flexmagic.client.work import Work
from flexmagic.client.world import HOOK, OWNER, Owner, Runs, World, worlds
from flexmagic.errors import ClusterError, FlexError, ModelError

if TYPE_CHECKING:
    from flexmagic.engine.code import HookSource

STATUS_PATIENCE = 3.0
"""Seconds after which a rank that has not said how it is counts as busy."""

StartProgress = Callable[[int, str], None]


class Session(Work, Cells):
    """A cluster of engines that holds one distributed model.

    Use :meth:`start` or :meth:`attach`, as a context manager or with :meth:`stop`.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._calls = Calls(cluster)
        self.cancel = self._calls.waiting.cancel
        self._model: Model | None = None
        self._id = uuid.uuid4().hex
        self._world = World(self._calls, self._id)
        self.hooks = HookBook(self._id, self._send_hook, self._forget_hook, lambda: self.model)
        self.hooks.on_change = self._note_hook
        self.known = Known(self._calls, lambda: self._id, self.hooks, lambda: self._model)
        self.losses = Losses()
        self.modules = Modules(self._calls, lambda: self._id, self)
        self.persistent = Persistent(self._calls, lambda: self._id)
        self._loading = Loading(self._calls)
        self.runs = Runs(lambda: self._world, self._calls, lambda: self.model)
        self._restoring = Restoring(self._calls, cluster, self.hooks)
        self._restoring.settle = self._resettle
        self._running = Running(self._calls, self._id, self.hooks, note=self.runs.note)
        self._settle: Callable[[Recovered], None] | None = None
        _OPEN.add(self)

    @classmethod
    def start(
        cls,
        n: int = 2,
        *,
        keep: bool = False,
        oversubscribe: bool = False,
        progress: StartProgress | None = None,
    ) -> Session:
        """Start ``n`` engines on this host, one per rank.

        They end with this process unless ``keep``. More engines than GPUs (or, without GPUs, than
        CPU cores) need ``oversubscribe``. Raises :class:`ClusterError`.
        """
        say = progress or (lambda _up, _what: None)
        cluster = Cluster.start(n, keep=keep, oversubscribe=oversubscribe, progress=say)
        return cls._joined(cluster, lambda: say(n, "connecting the ranks"))

    @classmethod
    def attach(cls, name: str | None = None, *, hooks: bool = False, kernel: str = "") -> Session:
        """Use a running cluster: by its id or profile, or the only one there is.

        A model that it holds is found again, and the hooks and :attr:`runs` of a notebook that has
        ended, the latest if there are several; what a dead one was still running is ended. Hooks of
        notebooks that are at work are copied only with ``hooks``. The engines stay when this
        session ends, unless they were left by an earlier process of this ``kernel`` (see :meth:`leave`).
        With an engine that has ended, :meth:`recover` comes first; the rest is found then.
        """
        session = cls._joined(Cluster.attach(name), lambda: None)
        if kernel:
            session._cluster.adopt(kernel)  # noqa: SLF001 - its own class
        if session._calls.ended():  # noqa: SLF001
            session._settle = lambda recovered: session._found_late(recovered, others=hooks)  # noqa: SLF001
        else:
            session._take_over(others=hooks)  # noqa: SLF001
        return session

    def _found_late(self, recovered: Recovered, *, others: bool) -> None:
        """What :meth:`attach` left undone while engines were missing."""
        self._calls.ranks.seats = [*self._calls.groups.everywhere(engine_side.seat)]
        self._find_model()
        self._take_over(others=others)
        self._restoring.define(recovered.replaced)

    def _take_over(self, *, others: bool) -> None:
        """Go on with what a session whose process has ended left behind."""
        found = worlds(self._calls)
        gone = [name for name, owner in found.items() if owner.gone]
        if gone:
            self._id = gone[-1]
            self._world = World(self._calls, self._id)
            self.hooks.owner = self._id
            self.modules.receive()
            numbers = list(self.runs)
            self._running = Running(
                self._calls, self._id, self.hooks, note=self.runs.note, first=max(numbers, default=0) + 2
            )
            for kept in self._world.names(HOOK):
                self.hooks.receive(self._world.get(f"{HOOK}{kept}"))
        self._world.keep(OWNER, Owner())
        if others and self._model is not None:
            for name in found.keys() - set(gone):
                world = World(self._calls, name)
                for kept in world.names(HOOK):
                    self.hooks.receive(world.get(f"{HOOK}{kept}"), self._model)

    def _note_hook(self, name: str, hook: Hook | None) -> None:
        if hook is None:
            self._world.drop(f"{HOOK}{name}")
        else:
            self._world.keep(f"{HOOK}{name}", hook.known)

    def _find_model(self) -> None:
        reports = self._calls.all("describe_model")
        if all(report is not None for report in reports):
            self._model = Model(self._calls, reports)

    @classmethod
    def _joined(cls, cluster: Cluster, before: Callable[[], None]) -> Session:
        try:
            before()
            session = cls(cluster)
            with cluster.turns.turn():  # what a notebook that is at work runs comes to its end first
                session._join()
                session._calls.connect()
            session._calls.mend = session._mend
        except BaseException:
            if cluster.owned:
                cluster.stop()
            else:
                cluster.disconnect()
            raise
        return session

    def _join(self) -> None:
        """Make the engines the ranks of one process group, unless they already are."""
        alive = self._calls.ranks.alive()
        left = [] if self._cluster.owned else self._restoring.at_work(alive)
        if left:  # of a notebook that has ended
            self._restoring.free(left)
        seats = self._calls.groups.each(dict.fromkeys(alive, (engine_side.seat, ())))
        if all(seat and (seat.rank, seat.world_size) == (r, self.world_size) for r, seat in seats.items()):
            self._calls.ranks.seats = [seats.get(rank) for rank in range(self.world_size)]
            if len(alive) == self.world_size:
                if left:
                    self._calls.rebuild()
                self._find_model()
            return
        if any(seats.values()) or len(alive) < self.world_size:
            msg = (
                "Some of these engines belong to a session of another size, or ended before they were "
                "connected. Stop that cluster and start again."
            )
            raise ClusterError(msg)
        self._calls.groups.prepare(range(self.world_size))
        meeting = meeting_at(*self._calls.groups.offer_place(), {})
        places = {
            rank: (engine_side.join, (rank, self.world_size, meeting)) for rank in range(self.world_size)
        }
        seated = self._calls.groups.each(places)
        self._calls.ranks.seats = [seated[rank] for rank in range(self.world_size)]
        self._world.keep(OWNER, Owner())

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._calls.world_size

    @property
    def cluster_name(self) -> str:
        """The name by which another notebook can attach."""
        return self._cluster.name

    @property
    def owns_engines(self) -> bool:
        """Whether this session started the engines, so that stopping it ends them."""
        return self._cluster.owned

    @property
    def model(self) -> Model:
        """The loaded model; raises :class:`ModelError` if there is none."""
        if self._settle is not None:
            msg = (
                f"An engine had ended when this notebook attached, so the model was not looked for. {RECOVER}"
            )
            raise ModelError(msg)
        if self._model is None or not self._model.alive:
            msg = "No model is loaded. Type %flexmodel PATH --tp 2, or use a %%flexmodel cell."
            raise ModelError(msg)
        return self._model

    def load(
        self,
        source: str | Path | Callable[..., Any],
        *,
        tp: int | None = None,
        pp: int | None = None,
        dp: int | None = None,
        fsdp: int | None = None,
        dtype: str | None = None,
        attn: str | None = None,
        unsharded: Callable[[], Any] | None = None,
        progress: Progress | None = None,
    ) -> Model:
        """Load a model, split over all ranks, and survey its layouts.

        ``source``: a folder or hub id of a Hugging Face model, split by transformers' own means over
        ``tp`` ranks by tensor parallelism, ``pp`` by layers, ``dp`` by rows of the batch and ``fsdp``
        by rows with the weights sharded (default: all ranks by ``tp``); or a builder
        ``(rank, world_size, device, mesh) -> torch.nn.Module`` that runs on every engine and
        distributes the model in its own way, ``mesh`` having the axes asked for; it may also return a
        schedule of torch.distributed.pipelining. ``dtype``: a torch
        dtype's name. ``attn``: an attention implementation such as ``"eager"``, which also returns
        attention patterns. ``unsharded``: beside a builder, a function that makes the same model
        undistributed, of which only shapes are taken. Raises :class:`ModelError`; the former model is
        then still there.
        """
        sizes = {"pp": pp, "dp": dp, "fsdp": fsdp, "tp": tp}
        if callable(source):
            self._model = self._loading.build(source, sizes, unsharded, progress)
        else:
            self._model = self._loading.load(str(source), sizes, dtype, attn, progress)
        return self._model

    def load_cell(
        self, text: str, *, first_line: int = 1, progress: Progress | None = None, **sizes: int | None
    ) -> Model:
        """Run a cell on every engine that assigns ``model``; see :meth:`load` for the names at hand.

        ``sizes``: of the axes of ``mesh``, as in :meth:`load`.
        """
        self._model = self._loading.run_cell(text, first_line, sizes, progress)
        return self._model

    def _send_hook(self, source: HookSource) -> None:
        try:
            self._calls.all("define_hook", source)
        except FlexError:
            self._forget_hook(source.name, source.version)
            raise

    def _forget_hook(self, name: str, number: int) -> None:
        with contextlib.suppress(ClusterError):  # a rank that is gone has forgotten it too
            self._calls.all("forget_hook", self._id, name, number)

    def status(self) -> Table:
        """Each rank's engine, host, process, device, memory, part of the model and state.

        The state is ``idle``, what the rank is doing now, also for another notebook, or ``ended``.
        """
        vitals = self._calls.ranks.control.vitals(range(self.world_size), STATUS_PATIENCE)
        ended = self._calls.ended()
        title = f"Cluster {self.cluster_name}: {self.world_size} engines"
        if ended:
            title += f", of which {len(ended)} ended. {RECOVER}"
        return status_table(self._calls.ranks.seats, self._calls.ranks.engines, vitals, ended, title)

    def recover(self, *, force: bool = False, say: Callable[[str], None] = lambda _what: None) -> Recovered:
        """Put the engines in order again: busy ones are freed, and those that ended are started again.

        An engine that ended comes back under its rank and loads only its own part of the model again;
        hooks and modules are registered there, and the other ranks keep their parts and captures. What a cell
        made is made again on every rank. ``force``: make the process groups again in any case.
        Raises :class:`ClusterError` or :class:`ModelError` if that cannot be done.
        """
        recovered = self._restoring.recover(self._model, say, force=force)
        if self._settle is not None:
            self._settle(recovered)
            self._settle = None
            if 0 in recovered.replaced:
                lost = "What an earlier notebook left (hooks, runs) was known to rank 0 alone and is lost."
                recovered = replace(recovered, lines=(*recovered.lines, lost))
        self._calls.connect()
        if recovered.replaced:
            self._restoring.settle()
        return recovered

    def _resettle(self) -> None:
        self._world.keep(OWNER, Owner())  # rank 0 may be another one now
        for hook in self.hooks:
            self._note_hook(hook.name, hook)
        if len(self.modules):
            self.modules.restore()

    def _mend(self) -> str:
        """Recover by itself, and say so."""
        self._running.printer(
            f"The engine of rank {', '.join(map(str, self._calls.ended()))} is started again …"
        )
        return str(self.recover())

    def limit(
        self,
        *,
        run: float | None = None,
        alone: float | None = None,
        captures: int | None = None,
        recover: bool | None = None,
    ) -> None:
        """Set what runs may take; what is not given stays as it was.

        ``run``: seconds after which any call is ended on all ranks, 0 for no limit (the default).
        ``alone``: seconds that user code may take on some ranks while the others wait for them (10).
        ``captures``: bytes of captures that each rank keeps; beyond, the oldest runs go (2 GiB).
        ``recover``: whether an engine that had to be ended to free the others is started again at
        once, as :meth:`recover` does (yes).
        """
        limits = self._calls.waiting.limits
        self._calls.waiting.limits = replace(
            limits,
            run=limits.run if run is None else run or None,
            alone=limits.alone if alone is None else alone,
        )
        if recover is not None:
            self._calls.mends = recover
        if captures is not None:
            self._calls.all("budget", captures)

    def stop(self) -> None:
        """End the session: its own engines are stopped, those it attached to (or keeps) stay."""
        self._end(self._cluster.stop if self._cluster.owned else self._cluster.disconnect)

    def shutdown_engines(self) -> None:
        """End the engines whoever started them."""
        self._end(self._cluster.stop)

    def leave(self, *, kernel: str = "") -> None:
        """What the end of the process does: stop the engines unless they shall be kept.

        ``kernel``: one that restarts; instead, the engines will wait two minutes for its next process.
        """
        if kernel:
            model = f", {self._model.name}" if self._model is not None and self._model.alive else ""
            self._cluster.outlive(kernel, f"{self.world_size} engines{model}")
            return
        if self._cluster.keep:
            self._end(self._cluster.disconnect)
        else:
            self.stop()

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End the session as :meth:`leave` does."""
        self.leave()

    def _end(self, how: Callable[[], None]) -> None:
        _OPEN.discard(self)
        self._calls.ranks.lines.close()
        how()

    def __repr__(self) -> str:
        """Cluster and model; asks no engine."""
        model = str(self._model) if self._model is not None and self._model.alive else "no model"
        return f"<Session {self.cluster_name}: {self.world_size} engines, {model}>"


_OPEN: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    for session in list(_OPEN):
        with contextlib.suppress(Exception):  # the process is ending: the reaper does what is left
            session.leave()
