"""A session: one notebook or script, one cluster, one model, its hooks and runs."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flexmagic.client import engine_side, failures
from flexmagic.client.calls import Calls, Progress
from flexmagic.client.cluster import Cluster
from flexmagic.client.hooks import Hook, HookBook
from flexmagic.client.model import Model
from flexmagic.client.run import Run
from flexmagic.client.status import status_table
from flexmagic.client.table import Table
from flexmagic.errors import CellError, ClusterError, FlexError, ModelError, SiteError
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.engine.code import HookSource
    from flexmagic.engine.runtime import RunPlan
    from flexmagic.engine.verbs import RunAnswer, Seat

STATUS_PATIENCE = 3.0
"""Seconds after which a rank that has not said how it is counts as busy."""

StartProgress = Callable[[int, str], None]


class Session:
    """A cluster of engines that holds one distributed model.

    Use :meth:`start` or :meth:`attach`, as a context manager or with :meth:`stop`.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._calls = Calls(cluster)
        self._runs = itertools.count(1)
        self._model: Model | None = None
        self._seats: list[Seat] = []
        self._printer: Callable[[str], None] = print
        self._id = uuid.uuid4().hex
        self.hooks = HookBook(self._id, self._send_hook, self._forget_hook)
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
    def attach(cls, name: str | None = None) -> Session:
        """Use a running cluster: by its id or profile, or the only one there is.

        A model that it holds is found again. Its engines stay when this session ends.
        """
        return cls._joined(Cluster.attach(name), lambda: None)

    def _find_model(self) -> None:
        reports = self._calls.all("describe_model")
        if all(report is not None for report in reports):
            self._model = Model(self._calls, reports)

    @classmethod
    def _joined(cls, cluster: Cluster, before: Callable[[], None]) -> Session:
        try:
            before()
            session = cls(cluster)
            session._join()
        except BaseException:
            if cluster.owned:
                cluster.stop()
            else:
                cluster.disconnect()
            raise
        return session

    def _join(self) -> None:
        """Make the engines the ranks of one process group, unless they already are."""
        seats = self._calls.raw(engine_side.seat, [()] * self.world_size)
        if [seat and (seat.rank, seat.world_size) for seat in seats] == [
            (rank, self.world_size) for rank in range(self.world_size)
        ]:
            self._seats = seats
            self._find_model()
            return
        if any(seats):
            msg = (
                "Some of these engines belong to a session of another size. "
                "Stop that cluster and start again."
            )
            raise ClusterError(msg)
        hosts = self._calls.raw(engine_side.host_name, [()] * self.world_size)
        host = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
        port = self._calls.raw_one(0, engine_side.offer_port, host)
        places = [(rank, self.world_size, host, port) for rank in range(self.world_size)]
        self._seats = self._calls.raw(engine_side.join, places)

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
        mesh = self._mesh({"pp": pp, "dp": dp, "fsdp": fsdp, "tp": tp})
        if callable(source):
            return self._build(self._cell("", source), mesh, progress, unsharded)
        from flexmagic.engine.distributed import LoadSpec

        spec = LoadSpec(str(source), mesh, dtype, attn)
        self._calls.one(0, "check_model", spec)
        return self._adopted("load_model", spec, progress=progress)

    def load_cell(
        self, text: str, *, first_line: int = 1, progress: Progress | None = None, **sizes: int | None
    ) -> Model:
        """Run a cell on every engine that assigns ``model``; see :meth:`load` for the names at hand.

        ``sizes``: of the axes of ``mesh``, as in :meth:`load`.
        """
        return self._build(self._cell(text, None, first_line), self._mesh(sizes), progress)

    def _mesh(self, sizes: Mapping[str, int | None]) -> Mesh:
        """The mesh over all ranks with the sizes asked for."""
        given = {axis: size for axis, size in sizes.items() if size is not None}
        product = math.prod(given.values())
        if not given:
            return Mesh.of(tp=self.world_size)
        if product != self.world_size:
            asked = " ".join(f"--{axis} {size}" for axis, size in given.items())
            msg = (
                f"{asked} is for {product} ranks, but there are {self.world_size} engines, one per rank. "
                f"Choose sizes whose product is {self.world_size}, or start {product} engines."
            )
            raise ModelError(msg)
        return Mesh.of(**given)

    def _cell(self, text: str, function: Callable[..., Any] | None, first_line: int = 1) -> HookSource:
        from flexmagic.engine.code import check_cell, from_function, from_text

        if function is not None:
            return from_function("model", 1, function)
        source = from_text("model", 1, text, first_line)
        check_cell(source)
        return source

    def _build(
        self,
        cell: HookSource,
        mesh: Mesh,
        progress: Progress | None,
        unsharded: Callable[[], Any] | None = None,
    ) -> Model:
        try:
            return self._adopted("build_model", cell, mesh, unsharded, progress=progress)
        except CellError as error:
            raise failures.cell_error(error, self.world_size) from None

    def _adopted(self, verb: str, *args: Any, progress: Progress | None) -> Model:
        """Have every rank make a model; only when all have one does it replace the former."""
        try:
            self._calls.all(verb, *args, progress=progress)
        except FlexError:
            with contextlib.suppress(FlexError):  # a stuck rank has said so already
                self._calls.all("drop_built")
            raise
        self._model = Model(self._calls, self._calls.all("adopt_model", progress=progress))
        return self._model

    def hook(
        self,
        sites: str | Sequence[str],
        code: str | Callable[..., Any] = "",
        *,
        name: str | None = None,
        local: bool = False,
        first_line: int = 1,
    ) -> Hook:
        """Register code at sites, on every engine or on none; the same name replaces.

        ``code`` is a hook's body, or a function ``(x, h)`` that may return the new value; an empty
        body only captures. ``x`` is the whole tensor, with ``local`` each rank's own piece. A run
        with a hook on whole tensors sends a pipeline its batch in one piece, not in micro-batches;
        with ``local`` hooks alone each micro-batch's piece comes by itself.
        Raises :class:`SiteError`, :class:`LayoutError` or :class:`HookError`.
        """
        listed = [sites] if isinstance(sites, str) else list(sites)
        return self.hooks.register(self.model, listed, code, name=name, local=local, first_line=first_line)

    def _send_hook(self, source: HookSource) -> None:
        try:
            self._calls.all("define_hook", source)
        except FlexError:
            self._forget_hook(source.name, source.version)
            raise

    def _forget_hook(self, name: str, number: int) -> None:
        with contextlib.suppress(ClusterError):  # a rank that is gone has forgotten it too
            self._calls.all("forget_hook", self._id, name, number)

    def run(
        self,
        inputs: Any,
        *,
        capture: str | Sequence[str] = (),
        seed: int = 0,
        grad: bool = False,
        backward: str | Callable[[Any], Any] | None = None,
        progress: Progress | None = None,
    ) -> Run:
        """One forward under the enabled hooks, and one backward if there is a loss.

        ``inputs``: a text, a list of texts, token ids ``[seq]`` or ``[batch, seq]``, or a dict of
        the model's own keyword arguments. Captured are the hooks' sites, the model's own outputs
        and the ``capture`` patterns. ``seed`` fixes all random draws in hooks.

        ``backward``: a loss to differentiate, as an expression over ``logits``, ``output`` and
        ``ids``, which are those of the whole batch, or as a function of an object with these
        attributes. Gradients, at the ports ``grad_output``, ``grad_input`` and, for a parameter,
        ``grad``, are those of that loss on the whole batch, as in one process, however the rows are
        shared out. The model's own ``.grad`` fields stay as they were. ``grad``: run the forward
        with autograd on, without a loss.

        Raises :class:`InputError`, :class:`HookError` or :class:`ModelError`.
        """
        model = self.model
        patterns = [Site.parse(t) for t in ([capture] if isinstance(capture, str) else capture)]
        if not model.surveyed:
            model.update(self._calls.all("survey_for", inputs, progress=progress))
        attempt = functools.partial(
            self._attempt, patterns, inputs, key=(self._id, next(self._runs)), progress=progress,
            seed=seed, grad=grad, backward=backward,
        )  # fmt: skip
        made = attempt()
        if made is None:  # the model, or the kind of input, is a new one
            model.update(self._calls.all("survey_for", inputs, progress=progress))
            made = attempt()
        if made is None:
            msg = "The model changes with every forward, so that no survey of it holds."
            raise ModelError(msg)
        planned, acted, answers = made
        self._print(answers)
        try:
            failures.raise_for([answer.reply for answer in answers], model.rules)
        except FlexError:
            self._calls.all("release", planned.key)
            raise
        return Run(planned.key, self._calls, answers, model.rules, acted)

    def _attempt(
        self, patterns: list[Site], inputs: Any, *, progress: Progress | None, **options: Any
    ) -> tuple[RunPlan, dict[Site, str], list[RunAnswer]] | None:
        """Plan a run with what is known of the model, and make it; ``None`` if that no longer holds."""
        from flexmagic.client.planning import plan

        model = self.model
        if options["backward"] is not None and not model.knows_gradients:
            model.update(self._calls.all("survey_gradients", inputs, progress=progress))
        try:
            planned, acted = plan(model, self.hooks.enabled, patterns, **options)
        except SiteError:
            if any(self._calls.all("is_stale", inputs)):
                return None
            raise
        answers = self._calls.all("run", planned, inputs, progress=progress)
        return None if None in answers else (planned, acted, answers)

    def _print(self, answers: list[RunAnswer]) -> None:
        """Show what hooks printed: once if all ranks printed the same, else by rank."""
        printed = ["".join(text for _, _, text in answer.reply.outcome.printed) for answer in answers]
        if len(set(printed)) == 1:
            if printed[0]:
                self._printer(printed[0].rstrip("\n"))
            return
        for rank, text in enumerate(printed):
            for line in text.splitlines():
                self._printer(f"[rank {rank}] {line}")

    def status(self) -> Table:
        """Each rank's engine, host, process, device, memory, part of the model and state.

        The state is ``idle``, ``busy`` for a rank that does not answer now, or ``ended``.
        """
        vitals = self._calls.poll("vitals", STATUS_PATIENCE)
        title = f"Cluster {self.cluster_name}: {self.world_size} engines"
        return status_table(self._seats, self._calls.engines, vitals, title)

    def stop(self) -> None:
        """End the session: its own engines are stopped, those it attached to (or keeps) stay."""
        _OPEN.discard(self)
        if self._cluster.owned:
            self._cluster.stop()
        else:
            self._cluster.disconnect()

    def shutdown_engines(self) -> None:
        """End the engines whoever started them."""
        _OPEN.discard(self)
        self._cluster.stop()

    def leave(self) -> None:
        """What the end of the process does: stop the engines unless they shall be kept."""
        if self._cluster.keep:
            self._cluster.disconnect()
        else:
            self.stop()

    def __enter__(self) -> Self:
        """The session itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End the session as :meth:`leave` does."""
        _OPEN.discard(self)
        self.leave()

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
