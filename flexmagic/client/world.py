"""What a session leaves with the engines of itself, so that a notebook that starts again finds it.

Hooks and runs are kept on the engines under their owner, the session. Rank 0 also keeps, as bytes
that only a client reads, what the notebook knows of them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from flexmagic.client.calls import Calls
from flexmagic.client.generation import Generation
from flexmagic.client.model import Model
from flexmagic.client.run import Run
from flexmagic.errors import FlexError, SiteError

OWNER, HOOK, RUN = "owner", "hook/", "run/"

LAST = "last"
"""Where the number of a run is left that is gone and was the last."""

MOST = 200
"""How many runs of a session are noted; the oldest goes first."""


@dataclass(frozen=True)
class Owner:
    """The process that a session lives in."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=lambda: _started(os.getpid()))

    @property
    def gone(self) -> bool:
        """Whether the process has ended, as far as can be told from here."""
        return self.host == socket.gethostname() and _started(self.pid) != self.started


def _started(pid: int) -> float:
    """When a process was started, 0 if there is none: a process id alone may be another's by now."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0


class World:
    """What one session has left with rank 0; ``spare``: and with the last rank, should that engine end."""

    def __init__(self, calls: Calls, owner: str, *, spare: bool = False) -> None:
        self._calls = calls
        self._ranks = sorted({0, calls.world_size - 1 if spare else 0})
        self.owner = owner

    def keep(self, name: str, value: Any) -> None:
        """Leave a value under a name; nobody waits for it to arrive."""
        import cloudpickle

        self._post(name, cloudpickle.dumps(value))

    def drop(self, name: str) -> None:
        """Take back what was left under a name."""
        self._post(name, None)

    def _post(self, name: str, value: bytes | None) -> None:
        for rank in self._ranks:
            self._calls.post(rank, "keep", self.owner, name, value)

    def names(self, kind: str) -> list[str]:
        """The names of a kind, without it, in the order in which they were left."""
        kept: list[str] = self._calls.one(0, "kept_names", self.owner)
        return [name.removeprefix(kind) for name in kept if name.startswith(kind)]

    def get(self, name: str) -> Any:
        """What was left under a name; raises :class:`SiteError` if there is nothing."""
        import cloudpickle

        raw = self._calls.one(0, "kept", self.owner, name)
        if raw is None:
            msg = f"the engines hold no {name.replace('/', ' ')}"
            raise SiteError(msg)
        return cloudpickle.loads(raw)

    def all(self) -> dict[str, Any]:
        """Everything that was left, by name, oldest first."""
        import cloudpickle

        kept: list[dict[str, bytes]] = [self._calls.one(rank, "all_kept", self.owner) for rank in self._ranks]
        return {name: cloudpickle.loads(raw) for name, raw in max(kept, key=len).items()}


def worlds(calls: Calls) -> dict[str, Owner]:
    """All sessions that left something, the latest last."""
    found = {}
    for name in calls.one(0, "owners"):
        try:
            found[name] = World(calls, name).get(OWNER)
        except FlexError:
            continue
    return found


class Runs:
    """The runs of a session that the engines still hold, by number; also of a notebook that has ended."""

    def __init__(self, world: Callable[[], World], calls: Calls, model: Callable[[], Model]) -> None:
        self._world = world
        self._calls = calls
        self._model = model

    def note(self, run: Run) -> None:
        """Leave with the engines what the notebook knows of a run, and which processes hold it."""
        engines = [0 if rank in run.lost else pid for rank, pid in enumerate(self._calls.ranks.pids)]
        self._world().keep(f"{RUN}{run.number}", (type(run).__name__, run.known, engines))
        if run.number > MOST:
            self._world().drop(f"{RUN}{run.number - MOST}")

    def __getitem__(self, number: int) -> Run:
        """A run; raises :class:`SiteError` if the engines hold none of that number."""
        return self.made(self._world().get(f"{RUN}{number}"))

    def made(self, noted: tuple[str, dict[str, Any], list[int]]) -> Run:
        """A run of what was noted of it; it knows which ranks have another engine now."""
        kind, known, engines = noted
        made = {"Run": Run, "Generation": Generation}[kind]
        model = self._model()
        run: Run = made(calls=self._calls, rules=model.rules, standing_for=model.standing_for, **known)
        now = self._calls.ranks.pids
        run.lost_on(rank for rank, was in enumerate(engines) if was != now[rank])
        return run

    def __iter__(self) -> Iterator[int]:
        """The numbers, oldest first."""
        return iter([int(name) for name in self._world().names(RUN)])

    def __len__(self) -> int:
        """How many there are."""
        return len(list(iter(self)))

    def __repr__(self) -> str:
        """The numbers."""
        return f"<runs {', '.join(map(str, self)) or 'none'}>"
