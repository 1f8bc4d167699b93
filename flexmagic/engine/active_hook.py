"""A hook as it acts in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexmagic.engine.code import HookSource
from flexmagic.layout.heads import Heads
from flexmagic.layout.sites import Site


@dataclass(frozen=True)
class ActiveHook:
    """A compiled hook and the exact sites it runs at in this run, on ``heads`` of their features."""

    source: HookSource
    call: Callable[[dict[str, Any]], Any]
    sites: frozenset[Site]
    heads: Heads | None = None

    @property
    def limited(self) -> bool:
        """Whether its body sees only a part of the tensor."""
        return not self.source.limits.whole or self.heads is not None

    def acts_at(self, site: Site) -> bool:
        """Whether it runs at a site that the forward has reached."""
        return site in self.sites

    def settle(self, *, well: bool) -> None:
        """After it ran on a whole tensor: what all ranks have to agree on, given that this one is well."""
