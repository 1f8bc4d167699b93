"""Tensors that were made of a capture where it is: what one rank holds, and the difference of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flexmagic.client.activation import Activation, Origin
from flexmagic.layout.layout import Layout

if TYPE_CHECKING:
    from flexmagic.client.calls import Calls
    from flexmagic.layout.layout import Block
    from flexmagic.view.source import Info


class Derived(Activation):
    """An activation with facts of its own in its header.

    ``block``: which part of a whole it is, by which its tokens are known; ``None`` for all of it.
    """

    def __init__(
        self, calls: Calls, origin: Origin, layout: Layout, facts: Mapping[str, Any], block: Block | None
    ) -> None:
        super().__init__(calls, origin, layout, dict)
        self._facts = dict(facts)
        self._block = block

    @property
    def info(self) -> Info:
        """What is known without touching data."""
        return replace(super().info, **self._facts)

    def labels(self, dim: int, fixed: Mapping[int, int] | None = None) -> Sequence[str] | None:
        """The tokens along a ``seq`` dim, of the row of the whole batch at which ``fixed`` stands."""
        if self._block is None:
            return super().labels(dim, fixed)
        if self.dims[dim] != "seq":
            return None
        at = self.dims.index("batch") if "batch" in self.dims else None
        row = 0 if at is None else positions(self._block[at])[(fixed or {}).get(at, 0)]
        tokens = self._origin.tokens[row] if row < len(self._origin.tokens) else ()
        places = positions(self._block[dim])
        return [tokens[i] for i in places] if places and places[-1] < len(tokens) else None


def positions(spans: Sequence[tuple[int, int]]) -> list[int]:
    """The positions that spans cover, in their order."""
    return [i for start, stop in spans for i in range(start, stop)]


def held(calls: Calls, origin: Origin, layout: Layout, rank: int) -> Derived:
    """What one rank holds as a whole of its own, in its own positions."""
    block, shape = layout.blocks[rank], layout.local_shape(rank)
    assert block is not None  # only ranks that hold something are asked for
    assert shape is not None
    own = tuple(((0, n),) for n in shape)
    blocks = tuple(own if other == rank else None for other in range(len(layout.blocks)))
    what = "summand" if layout.partial else "own part"
    facts = {"placements": (f"{what} of rank {rank}, in its own positions",), "nbytes": 0}
    return Derived(calls, origin, replace(layout, shape=shape, blocks=blocks, addends=()), facts, block)


def difference(calls: Calls, before: tuple[Origin, Layout], after: tuple[Origin, Layout]) -> Derived:
    """One capture minus another that lies in the same way, subtracted and kept where they are."""
    from flexmagic.view.reduce import difference_dtype

    (first, _), (second, layout) = before, after
    seen = second.site.seen_by(f"minus {first.run[1:]} {first.site}")
    request: tuple[str, Any, Any] = (
        "subtract",
        ((first.run, first.site), (second.run, second.site), seen),
        {},
    )
    answers = calls.some(dict.fromkeys(layout.ranks, request))
    facts = {"site": str(second.site), "hook": "", "run": "B - A", "step": None}
    origin = replace(second, site=seen, nbytes=sum(answers.values()), warnings=())
    dtype = difference_dtype(before[1].dtype, layout.dtype)
    return Derived(calls, origin, replace(layout, dtype=dtype), facts, None)
