"""Worlds of their own on one connection to a cluster: hooks and runs of several people, who never meet."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from flexmagic.client import engine_side
from flexmagic.client.calls import Calls
from flexmagic.client.cluster import Cluster, is_over
from flexmagic.client.hook_book import HookBook
from flexmagic.client.hooks import Hook
from flexmagic.client.losses import Losses
from flexmagic.client.model import Model
from flexmagic.client.modules import Modules
from flexmagic.client.run import Run
from flexmagic.client.running import Running
from flexmagic.client.session import Session
from flexmagic.client.work import Work
from flexmagic.client.world import HOOK, LAST, RUN, Runs, World
from flexmagic.engine.code import HookSource
from flexmagic.engine.declared import Declared
from flexmagic.engine.limits import Limits
from flexmagic.errors import EngineError, FlexError, HookError, ModelError

if TYPE_CHECKING:
    from flexmagic.client.restoring import Recovered
    from flexmagic.engine.verbs import RunAnswer

VERSIONS = 8
"""How many versions are kept of a hook."""

T = TypeVar("T")

Versions = list[dict[str, int]]
"""How often each parameter was written into, of each rank."""


class Host:
    """A connection to a running cluster for others to work on: it takes over nothing of anybody's.

    Whoever else uses the cluster goes first. ``again``: called when engines were replaced, by whomever, to
    give them what tenants have. An engine that had ended before is started again. Raises
    :class:`ClusterError` if there is no cluster.
    """

    def __init__(self, name: str | None) -> None:
        cluster = Cluster.attach(name)
        cluster.turns.gives_way = True
        self.session = Session._joined(cluster, lambda: None)  # noqa: SLF001 - as attach()
        self.calls: Calls = self.session._calls  # noqa: SLF001
        self._turn = cluster.turns.turn
        self._owner, self._numbers = uuid.uuid4().hex, itertools.count(1)
        self.again: Callable[[], None] = lambda: None
        self.session._restoring.settle = self._settle  # noqa: SLF001 - as above
        self.session._running.printer = lambda _text: None  # noqa: SLF001 - who is to know is told otherwise
        if self.calls.ended():
            self._mend()

    def _mend(self) -> None:
        """Start engines again that have ended, and find the model then."""

        def find(_recovered: Recovered) -> None:
            self.calls.ranks.seats = [*self.calls.groups.everywhere(engine_side.seat)]
            self.find_model()

        self.session._settle = find  # noqa: SLF001 - as above
        try:
            self.session.recover()
        except BaseException:
            self.close()
            raise

    def _settle(self) -> None:
        self.again()

    def key(self) -> tuple[str, int]:
        """What is kept of a forward of several tenants for as long as it takes."""
        return self._owner, next(self._numbers)

    @property
    def model(self) -> Model:
        """The loaded model; raises :class:`ModelError` if there is none."""
        return self.session.model

    @property
    def folder(self) -> Path:
        """Where the cluster's connection files are, which only its owner can read."""
        return self.session._cluster._security  # noqa: SLF001 - as attach()

    @property
    def is_over(self) -> bool:
        """Whether the cluster was stopped, or cannot be reached any more."""
        return is_over(self.session._cluster)  # noqa: SLF001 - as attach()

    def begin_boxes(self) -> None:
        """Have all engines begin with what boxes are made of, which takes seconds; nobody waits for it."""
        self.calls.post_all("begin_boxes")

    def no_boxes(self) -> str:
        """Why some engine can make no box for code that it does not trust; ``""`` if all can."""
        return next((reason for reason in self.calls.all("no_boxes") if reason), "")

    def find_model(self) -> None:
        """Look again which model the engines hold; its owner may have loaded another one."""
        self.session._find_model()  # noqa: SLF001

    def limit(self, seconds: float) -> None:
        """Seconds after which a call is ended on all ranks."""
        waiting = self.calls.waiting
        waiting.limits = replace(waiting.limits, run=seconds)

    @contextlib.contextmanager
    def unhurried(self) -> Iterator[None]:
        """In a block, calls may take as long as they do: guests' limits are not for what mends."""
        waiting = self.calls.waiting
        before, waiting.limits = waiting.limits, replace(waiting.limits, run=None)
        try:
            yield
        finally:
            waiting.limits = before

    def watched(
        self, work: Callable[[], T], before_it: Callable[[Versions], None] = lambda _versions: None
    ) -> tuple[T | BaseException, list[str]]:
        """Do something while nobody else can: what it returns or raises, and which weights it wrote into.

        ``before_it``: hears how often each parameter of each rank was written into until then.
        """
        with self._turn():
            before, lives = self.calls.all("weight_versions"), list(self.calls.lives)
            before_it(before)
            found: T | BaseException
            try:
                found = work()
            except (FlexError, KeyboardInterrupt) as error:
                if isinstance(error, EngineError):
                    raise
                found = error
            after = self.calls.all("weight_versions")
        gone = self.calls.gone(lives)  # a part that was loaded again counts anew
        kept = [(b, a) for rank, (b, a) in enumerate(zip(before, after, strict=True)) if rank not in gone]
        changed = {n for b, a in kept for n in b | a if b.get(n) != a.get(n)}
        return found, sorted(changed)

    def weights(self) -> tuple[Versions, list[dict[str, tuple[int, int]]]]:
        """Of each rank: how often each parameter was written into, and exact sums over its bits."""
        with self._turn(), self.unhurried():
            return self.calls.all("weight_versions"), self.calls.all("weight_sums")

    def put_back(self, names: Sequence[str]) -> None:
        """Give parameters the bits again that they were loaded with, the owner's edits made once more.

        All of them or none. For as long as it takes, engines hold the model twice. Raises :class:`ModelError`
        if it was not loaded from files or an edit fails now, else what loading raises.
        """
        with self._turn(), self.unhurried():
            origin, _ = self.calls.one(0, "origin")
            if origin is None or origin.spec is None:
                raise ModelError("the model was made in a cell, so that there is nothing to put back from")
            self.calls.one(0, "check_model", origin.spec)
            try:
                self.calls.all("load_model", origin.spec)
                self.calls.all("put_back", list(names))
            except HookError as error:
                said = "; ".join(f"{f.site}: {f.kind}: {f.message}" for f in error.failures[:1]) or str(error)
                raise ModelError(f"an edit of the owner's could not be made once more ({said})") from None
            finally:
                self.calls.all("drop_built")

    def close(self) -> None:
        """Let go of the cluster, which stays."""
        self.session.stop()


class Tenant(Work):
    """One person's hooks and runs on a :class:`Host`. ``say``: hears what the hooks print, and notes.

    ``boxed``: whether code in hooks runs walled in, see :mod:`flexmagic.engine.box`. ``owner``: of a world
    that another process made, whose hooks and :attr:`found` runs are these then.
    """

    def __init__(
        self,
        host: Host,
        say: Callable[[str], None] = lambda _text: None,
        *,
        boxed: bool = True,
        owner: str = "",
    ) -> None:
        self._host = host
        self._calls = host.calls
        self.owner = owner or uuid.uuid4().hex
        self._world = World(self._calls, self.owner, spare=True)
        self._runs = Runs(lambda: self._world, self._calls, lambda: self.model)
        self._last = 0
        self.found: dict[int, Run] = {}
        self.hooks = HookBook(self.owner, self._send, self._forget, lambda: self.model)
        self.hooks.boxed, self.hooks.versions = boxed, VERSIONS
        self.losses = Losses()
        self.modules = Modules(self._calls, lambda: self.owner, host.session)
        if owner:
            self._find()
        self.hooks.on_change = self._note_hook
        self._running = Running(self._calls, self.owner, self.hooks, printer=say, first=self._last + 1)
        self.cancel = self._calls.waiting.cancel

    def _find(self) -> None:
        """Take over what an earlier process left of this world."""
        left = self._world.all()
        for name, value in left.items():
            if name.startswith(HOOK):
                self.hooks.receive(value)
            elif name.startswith(RUN):
                self.found[int(name.removeprefix(RUN))] = self._runs.made(value)
        self._last = max([left.get(LAST, 0), *self.found])

    @property
    def model(self) -> Model:
        """The loaded model; raises :class:`ModelError` if there is none."""
        return self._host.model

    def declare(
        self,
        sites: Sequence[str],
        what: Declared | None,
        limits: Limits,
        *,
        name: str | None = None,
        group: str | None = None,
    ) -> Hook:
        """Register a hook without code, or one that captures only; errors as of :meth:`Work.hook`."""
        if what is None:
            return self.hooks.register(self.model, sites, "", name=name, group=group, limits=limits)
        return self.hooks.register(
            self.model, sites, what.function(), name=name, group=group, limits=limits, text=str(what)
        )

    def number(self) -> int:
        """A number that none of this tenant's runs has."""
        return self._running.number()

    def tell(self, answers: Sequence[RunAnswer]) -> None:
        """Say what the hooks of a run printed; each rank's answer."""
        self._running.tell([[answer] for answer in answers])

    def note(self, run: Run) -> None:
        """Leave with the engines what is known of a run, for a process that comes after this one."""
        self._last = max(self._last, run.number)
        self._runs.note(run)

    def again(self, runs: Sequence[Run] = ()) -> None:
        """Send all versions of all hooks once more, and note all, for engines that were replaced."""
        for hook in self.hooks:
            for version in hook.history:
                self._calls.all("define_hook", version.source)
            self._note_hook(hook.name, hook)
        for run in runs:
            self.note(run)

    def release(self, run: Run) -> None:
        """Free a run's captures on the engines, which nobody waits for."""
        run.release(wait=False)
        self._world.drop(f"{RUN}{run.number}")
        if run.number == self._last:  # no other run may ever have its number
            self._world.keep(LAST, run.number)

    def _note_hook(self, name: str, hook: Hook | None) -> None:
        if hook is None:
            self._world.drop(f"{HOOK}{name}")
        else:
            self._world.keep(f"{HOOK}{name}", hook.known)

    def leave(self, runs: Sequence[Run]) -> None:
        """Leave nothing on the engines."""
        for run in runs:
            self.release(run)
        for hook in list(self.hooks):
            with contextlib.suppress(FlexError):
                hook.remove()
        self._world.drop(LAST)
        with contextlib.suppress(FlexError):
            self._calls.all("end_box", self.owner)

    def _send(self, source: HookSource) -> None:
        try:
            self._calls.all("define_hook", source)
        except FlexError:
            self._forget(source.name, source.version)
            raise

    def _forget(self, name: str, number: int) -> None:
        self._calls.post_all("forget_hook", self.owner, name, number)
