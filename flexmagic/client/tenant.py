"""Worlds of their own on one connection to a cluster: hooks and runs of several people, who never meet."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from flexmagic.client.calls import Calls
from flexmagic.client.cluster import Cluster
from flexmagic.client.hook_book import HookBook
from flexmagic.client.hooks import Hook
from flexmagic.client.losses import Losses
from flexmagic.client.model import Model
from flexmagic.client.modules import Modules
from flexmagic.client.run import Run
from flexmagic.client.running import Running
from flexmagic.client.session import Session
from flexmagic.client.work import Work
from flexmagic.engine.code import HookSource
from flexmagic.engine.declared import Declared
from flexmagic.engine.limits import Limits
from flexmagic.errors import ClusterError, EngineError, FlexError

if TYPE_CHECKING:
    from flexmagic.engine.verbs import RunAnswer

VERSIONS = 8
"""How many versions are kept of a hook."""

T = TypeVar("T")


class Host:
    """A connection to a running cluster for others to work on: it takes over nothing of anybody's.

    Whoever else uses the cluster goes first. Raises :class:`ClusterError` if there is none.
    """

    def __init__(self, name: str | None) -> None:
        cluster = Cluster.attach(name)
        cluster.turns.gives_way = True
        self.session = Session._joined(cluster, lambda: None)  # noqa: SLF001 - as attach()
        self.calls: Calls = self.session._calls  # noqa: SLF001
        self._turn = cluster.turns.turn
        self._owner, self._numbers = uuid.uuid4().hex, itertools.count(1)

    def key(self) -> tuple[str, int]:
        """What is kept of a forward of several tenants for as long as it takes."""
        return self._owner, next(self._numbers)

    @property
    def model(self) -> Model:
        """The loaded model; raises :class:`ModelError` if there is none."""
        return self.session.model

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

    def watched(self, work: Callable[[], T]) -> tuple[T | BaseException, list[str]]:
        """Do something while nobody else can: what it returns or raises, and which weights it wrote into."""
        with self._turn():
            before = self.calls.all("weight_versions")
            found: T | BaseException
            try:
                found = work()
            except (FlexError, KeyboardInterrupt) as error:
                if isinstance(error, EngineError):
                    raise
                found = error
            after = self.calls.all("weight_versions")
        changed = {n for b, a in zip(before, after, strict=True) for n in b | a if b.get(n) != a.get(n)}
        return found, sorted(changed)

    def weights(self) -> tuple[list[dict[str, int]], list[dict[str, tuple[int, int]]]]:
        """Of each rank: how often each parameter was written into, and exact sums over its bits."""
        with self._turn():
            return self.calls.all("weight_versions"), self.calls.all("weight_sums")

    def close(self) -> None:
        """Let go of the cluster, which stays."""
        self.session.stop()


class Tenant(Work):
    """One person's hooks and runs on a :class:`Host`. ``say``: hears what the hooks print, and notes.

    ``boxed``: whether code in hooks runs walled in, see :mod:`flexmagic.engine.box`.
    """

    def __init__(
        self, host: Host, say: Callable[[str], None] = lambda _text: None, *, boxed: bool = True
    ) -> None:
        self._host = host
        self._calls = host.calls
        self.owner = uuid.uuid4().hex
        self.hooks = HookBook(self.owner, self._send, self._forget, lambda: self.model)
        self.hooks.boxed, self.hooks.versions = boxed, VERSIONS
        self.losses = Losses()
        self.modules = Modules(self._calls, lambda: self.owner, host.session)
        self._running = Running(self._calls, self.owner, self.hooks, printer=say)
        self.cancel = self._calls.waiting.cancel

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

    def again(self) -> None:
        """Send all versions of all hooks once more, for engines that were replaced."""
        for hook in self.hooks:
            for version in hook.history:
                self._calls.all("define_hook", version.source)

    def release(self, run: Run) -> None:
        """Free a run's captures on the engines; those of one that is gone are gone already."""
        with contextlib.suppress(FlexError):
            run.release()

    def leave(self, runs: Sequence[Run]) -> None:
        """Leave nothing on the engines."""
        for run in runs:
            self.release(run)
        for hook in list(self.hooks):
            with contextlib.suppress(FlexError):
                hook.remove()
        with contextlib.suppress(FlexError):
            self._calls.all("end_box", self.owner)

    def _send(self, source: HookSource) -> None:
        try:
            self._calls.all("define_hook", source)
        except FlexError:
            self._forget(source.name, source.version)
            raise

    def _forget(self, name: str, number: int) -> None:
        with contextlib.suppress(ClusterError):
            self._calls.all("forget_hook", self.owner, name, number)
