"""A hook as it acts in one run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexmagic.engine.code import HookSource
from flexmagic.layout.heads import Heads
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

    def acts_at(self, site: Site) -> bool:
        """Whether it runs at a site that the forward has reached."""
        return site in self.sites

    def passes(self, sites: Sequence[Site]) -> bool:
        """Of one that may act anywhere: whether it waits for none of some sites, which are then passed."""
        return not any(site in self.sites for site in sites)

    def settle(self, *, well: bool) -> None:
        """After it ran on a whole tensor: what all ranks have to agree on, given that this one is well."""


Place = tuple[str, str]
"""A module's path, and the port of it that is looked at."""


def places_of(
    captured: Collection[Site], hooks: Sequence[ActiveHook], idle: Callable[[], bool]
) -> Iterator[tuple[Place, Callable[[], bool]]]:
    """Where a run has to look, gradients last, and what says there that it may go on without a look.

    That is only where nothing acts or is captured but one hook that may act anywhere, or ``idle`` says so.
    """
    roaming = [hook for hook in hooks if hook.places]
    named = {*captured, *(site for hook in hooks if not hook.places for site in hook.sites)}
    looking = {(site.path, site.port) for site in named if site.port != "grad"}
    if len(roaming) > 1:
        looking.update(*(hook.places for hook in roaming))
    for hook in roaming[:1]:
        for place, sites in hook.places.items():
            if place not in looking:
                yield place, _passing(hook, sites, idle)
    for place in sorted(looking, key=_edits_first):
        yield place, _never


def _passing(hook: ActiveHook, sites: Sequence[Site], idle: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: idle() or hook.passes(sites)


def _never() -> bool:
    return False


def _edits_first(place: Place) -> tuple[bool, str, str]:
    """Gradients are watched on what the forward hooks left: those come first."""
    path, port = place
    return port.startswith("grad"), path, port
