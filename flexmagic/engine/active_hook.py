"""A hook as it acts in one run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flexmagic.engine.code import HookSource
from flexmagic.engine.elementwise import is_elementwise
from flexmagic.engine.limits import Window
from flexmagic.layout.dims import Dim
from flexmagic.layout.heads import Heads
from flexmagic.layout.part import Places
from flexmagic.layout.sites import Site


@dataclass(frozen=True)
class ActiveHook:
    """A compiled hook and the exact sites it runs at in this run, on ``heads`` of their features.

    ``own_rows``: it never writes into what it gets, but into copies of some of its rows. ``places``: of one
    that may act anywhere, ``sites`` by their paths and ports, those of which this rank has something.
    """

    source: HookSource
    call: Callable[[dict[str, Any]], Any]
    sites: frozenset[Site]
    heads: Heads | None = None
    own_rows: bool = False
    places: Mapping[tuple[str, str], Sequence[Site]] = field(default_factory=dict)

    @property
    def limited(self) -> bool:
        """Whether its body sees only a part of the tensor."""
        return not self.source.limits.whole or self.heads is not None

    @property
    def elementwise(self) -> bool:
        """Whether it may do to each rank's piece what it does to the whole, as its text shows."""
        plain = type(self) is ActiveHook and self.source.function is None and not self.source.boxed
        return plain and not self.limited and is_elementwise(self.source.text)

    def places_in(self, dims: Sequence[Dim], shape: tuple[int, ...], past: int) -> Places | None:
        """Which part of a tensor its body sees; ``None`` for all of it. ``past``: tokens before it."""
        return self.source.limits.places(dims, shape, past, self.heads)

    def window(
        self, dims: Sequence[Dim], shape: tuple[int, ...], past: int, *, cut: bool, strict: bool
    ) -> Window | None:
        """The same as a window on it, which is ``cut`` already or not; ``None`` where there is nothing.

        ``strict``: tokens that are not there are an error.
        """
        if cut:
            return Window((), self.heads and self.heads.packed())
        if self.source.limits.whole:
            return Window((), self.heads)
        window = self.source.limits.window(dims, shape, past, strict=strict)
        return None if window.empty else replace(window, heads=self.heads)

    def acts_at(self, site: Site) -> bool:
        """Whether it runs at a site that the forward has reached."""
        return site in self.sites

    def passes(self, sites: Sequence[Site]) -> bool:
        """Of one that may act anywhere: whether it waits for none of some sites, which are then passed."""
        return not any(site in self.sites for site in sites)

    def follow(self, reach: Callable[[Site], None]) -> None:
        """Of one that may act anywhere: call ``reach`` with each site that it begins to wait for."""

    def settle(self, *, well: bool) -> None:
        """After it ran on a whole tensor: what all ranks have to agree on, given that this one is well."""


Place = tuple[str, str]
"""A module's path, and the port of it that is looked at."""


def places_of(captured: Collection[Site], hooks: Sequence[ActiveHook]) -> list[Place]:
    """Where a run has to look from its start, gradients last.

    Hooks that may act anywhere are looked for there where gradients are: those are watched on what they left.
    """
    named = {*captured, *(site for hook in hooks if not hook.places for site in hook.sites)}
    looking = {(site.path, site.port) for site in named if site.port != "grad"}
    paths = {path for path, port in looking if port.startswith("grad")}
    looking.update(place for hook in hooks for place in hook.places if place[0] in paths)
    return sorted(looking, key=_edits_first)


def _edits_first(place: Place) -> tuple[bool, str, str]:
    """Gradients are watched on what the forward hooks left: those come first."""
    path, port = place
    return port.startswith("grad"), path, port
