"""What runs leave on a rank: local pieces, kept on their device within a budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from flexmagic.errors import SiteError
from flexmagic.layout.sites import Site

DEFAULT_BUDGET = 2 << 30

RunKey = tuple[str, int] | tuple[str, int, int]
"""The session that asked for a run, the run's number there, and the step of a generation."""


Reader = tuple[str, int]
"""The machine and the process that reads a piece."""

Join = Callable[[Site, dict[int, torch.Tensor]], torch.Tensor | str]
"""One tensor out of a site's numbered parts, or why there is none."""


@dataclass(frozen=True)
class Room:
    """Bytes that captures hold after a run, of how many, and the numbers of the runs that went for it.

    ``held`` is exact from half of the budget on; below, storage shared between runs may count several times.
    """

    held: int = 0
    budget: int = DEFAULT_BUDGET
    evicted: tuple[int, ...] = ()


@dataclass
class Capture:
    """One local piece and the version it had; a later in-place change shows in the version."""

    tensor: torch.Tensor
    version: int

    @property
    def intact(self) -> bool:
        """Whether nothing wrote into the piece since it was captured."""
        return self.tensor._version == self.version  # noqa: SLF001 - torch's documented counter

    @property
    def nbytes(self) -> int:
        """Bytes of the piece."""
        return self.tensor.nbytes


class Captures:
    """Pieces by run and site; the oldest run goes first when ``budget`` bytes are exceeded.

    Pieces are references to what the model computed, not copies, unless ``overwritten`` names the
    site: one where the model was seen to write into the tensor later. ``lent``: what processes of
    some machines are reading; see :mod:`flexmagic.engine.lending`. ``room``: as the last run left it.
    """

    def __init__(self, budget: int = DEFAULT_BUDGET) -> None:
        self.budget = budget
        self.overwritten: set[Site] = set()
        self.lent: dict[Reader, list[torch.Tensor]] = {}
        self._runs: OrderedDict[RunKey, dict[Site, Capture]] = OrderedDict()
        self._steps: dict[RunKey, set[RunKey]] = {}
        self._parts: dict[RunKey, dict[Site, dict[int, Capture]]] = {}
        self._evicted: set[RunKey] = set()
        self._finished: set[RunKey] = set()
        self._at_most = 0
        self.room = Room(0, budget)
        self._contexts: dict[RunKey, dict[str, Any]] = {}

    def keep(self, run: RunKey, site: Site, local: torch.Tensor, part: int | None = None) -> None:
        """Keep this rank's piece of a site for a run, or the numbered part of it that :meth:`join` joins."""
        piece = local.detach()
        if site in self.overwritten:
            piece = piece.clone()
        capture = Capture(piece, piece._version)  # noqa: SLF001
        if part is None:
            self._of(run)[site] = capture
            if run in self._finished:
                self._at_most += piece.untyped_storage().nbytes()
        else:
            self._parts.setdefault(run, {}).setdefault(site, {})[part] = capture

    def _of(self, run: RunKey) -> dict[Site, Capture]:
        """What is kept for a run, or for a step of one."""
        if run not in self._runs:
            self._runs[run] = {}
            self._steps.setdefault(run[:2], set()).add(run)
        return self._runs[run]

    def join(self, run: RunKey, how: Join) -> dict[Site, str]:
        """Make one piece of each site's parts; the reason for each site where that cannot be done."""
        refused = {}
        for site, parts in self._parts.pop(run, {}).items():
            if not all(part.intact for part in parts.values()):
                self.overwritten.add(site)
                refused[site] = "the model wrote into it later; it is copied from the next run on: run again"
                continue
            joined = how(site, {n: part.tensor for n, part in parts.items()})
            if isinstance(joined, str):
                refused[site] = joined
            else:
                self._of(run)[site] = Capture(joined, joined._version)  # noqa: SLF001
        return refused

    def finish(self, run: RunKey) -> dict[Site, Capture]:
        """Close a run: drop what was overwritten (it is copied from the next run on) and old runs."""
        kept = self._of(run)
        for site in [s for s, capture in kept.items() if not capture.intact]:
            self.overwritten.add(site)
            del kept[site]
        self._finished.add(run)
        self._at_most += _nbytes(kept.values())
        if self._at_most > self.budget / 2:  # only then it is worth while to look at all that there is
            self._at_most = self.nbytes
        held, went = self._at_most, list[int]()
        while held > self.budget and len(self._runs) > 1:
            oldest = next(iter(self._runs))
            self.drop(oldest)
            self._evicted.add(oldest)
            went.append(oldest[1])
            held = self._at_most = self.nbytes
        self.room = Room(held, self.budget, tuple(dict.fromkeys(went)))
        return kept

    def get(self, run: RunKey, site: Site) -> torch.Tensor:
        """The piece; raises :class:`SiteError` that says why there is none."""
        if run in self._evicted:
            msg = f"{_name(run)} was evicted: captures went over the budget of {self.budget:,} bytes per rank"
            raise SiteError(msg)
        capture = self._runs.get(run, {}).get(site)
        if capture is None:
            msg = f"{_name(run)} has no capture of {site} on this rank"
            raise SiteError(msg)
        if not capture.intact:
            msg = f"something wrote into the tensor of {site} after {_name(run)}; run again"
            raise SiteError(msg)
        return capture.tensor

    def remember(self, run: RunKey, context: dict[str, Any]) -> None:
        """Keep what a run's hooks saved, as long as its captures."""
        self._contexts[run] = context

    def context(self, run: RunKey) -> dict[str, Any]:
        """What a run's hooks saved; raises :class:`SiteError` for a run that is gone."""
        if run not in self._contexts:
            msg = f"run {run[1]} is no longer held by the engines"
            raise SiteError(msg)
        return self._contexts[run]

    def latest_context(self, owner: str) -> dict[str, Any]:
        """What the hooks of a session's latest run saved; empty before the first."""
        return next((saved for run, saved in reversed(self._contexts.items()) if run[0] == owner), {})

    def drop(self, run: RunKey) -> None:
        """Forget a run, all steps of a generation; or one step, if the key names it."""
        steps = self._steps.get(run[:2], set())
        for key in [key for key in steps if key[: len(run)] == run]:
            del self._runs[key]
            steps.remove(key)
            self._finished.discard(key)
        if not steps:
            self._steps.pop(run[:2], None)
            self._contexts.pop(run[:2], None)

    def clear(self) -> None:
        """Forget everything."""
        self._runs.clear()
        self._steps.clear()
        self._finished.clear()
        self._at_most = 0
        self._parts.clear()
        self._contexts.clear()
        self.overwritten.clear()
        self.lent.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces, storage shared between sites counted once."""
        return _nbytes(capture for captures in self._runs.values() for capture in captures.values())


def _nbytes(captures: Iterable[Capture]) -> int:
    storages = (capture.tensor.untyped_storage() for capture in captures)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _name(run: RunKey) -> str:
    return f"run {run[1]}" + (f", step {run[2]}," if len(run) == 3 else "")
