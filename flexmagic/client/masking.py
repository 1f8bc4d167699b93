"""An activation of which some elements are masked: ranks leave them out where they count and reduce."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.client.derived import Derived

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from flexmagic.client.activation import Activation, Siblings, Steps
    from flexmagic.layout.assemble import Read
    from flexmagic.layout.layout import Block
    from flexmagic.view.source import Share


class MaskedActivation(Derived):
    """An activation under a mask: indexing gives all values, what is shown and counted has no masked ones.

    The mask has as many dims as the activation, each of its size or of size 1; ranks get their part of it.
    """

    _mask: NDArray[np.bool_]

    def __init__(self, of: Activation, where: Any, facts: Mapping[str, Any], block: Block | None) -> None:
        from flexmagic.view.masks import mask_for

        super().__init__(of._calls, of._origin, of.layout, facts, block)  # noqa: SLF001 - of its kind
        self._of = of
        self._mask = mask_for(where, of.shape)
        layers, steps = of._siblings, of._steps  # noqa: SLF001 - as above
        self._siblings = lambda: _under(layers, where)
        self._steps = lambda: _steps_under(steps, where)

    def masked_at(self, index: tuple[int | slice, ...]) -> NDArray[np.bool_]:
        """Which elements of ``read(index)`` are masked."""
        found: NDArray[np.bool_] = np.broadcast_to(self._mask, self.shape)[index]
        return found

    def _counting(self, reads: Sequence[Read]) -> tuple[str, Sequence[Read], list[Any]]:
        return "masked_stats", reads, [(read.local, self._part(read.result)) for read in reads]

    def _reducing(
        self, reads: Sequence[Read], bounds: tuple[tuple[int, int], ...]
    ) -> tuple[str, Sequence[Read], list[Any]]:
        args = []
        for read in reads:
            spans = zip(read.result, bounds, strict=True)
            there = tuple(slice(at.start + first, at.stop + first) for at, (first, _) in spans)
            args.append((read.local, read.result, self._part(there)))
        return "masked_overview", reads, args

    def _part(self, there: tuple[slice, ...]) -> NDArray[np.bool_]:
        """The mask of a box of the whole, its dims of size 1 as they are."""
        sizes = zip(there, self._mask.shape, strict=True)
        return self._mask[tuple(slice(None) if n == 1 else at for at, n in sizes)]

    def shares(self, edges: NDArray[np.float64]) -> tuple[Share, ...]:
        """What each rank that can be reached holds itself and is not masked, counted into bins."""
        from flexmagic.view.source import Share

        run, site = self._origin.run, self._origin.site
        ranks = self._reachable()
        answers = self._calls.some(
            {rank: ("share", (run, site, edges, self._of_rank(rank)), {}) for rank in ranks}
        )
        return tuple(Share(rank, *answers[rank]) for rank in ranks)

    def _of_rank(self, rank: int) -> NDArray[np.bool_]:
        """The mask of what a rank holds, in its own positions."""
        from flexmagic.client.derived import positions

        block = self.layout.blocks[rank]
        assert block is not None  # it is one of the ranks
        places = [
            [0] if n == 1 else positions(spans) for n, spans in zip(self._mask.shape, block, strict=True)
        ]
        return self._mask[np.ix_(*places)]

    def held(self, rank: int) -> MaskedActivation:
        """What one rank holds as a tensor of its own, its part of the mask over it."""
        return masked(self._of.held(rank), self._of_rank(rank))


def _under(layers: Siblings, where: Any) -> dict[str, Callable[[], Activation]]:
    """Other layers, under the same mask."""
    return {name: partial(_open, opened, where) for name, opened in layers().items()}


def _steps_under(steps: Steps, where: Any) -> tuple[str | None, dict[str, Siblings]]:
    own, found = steps()
    return own, {name: partial(_under, there, where) for name, there in found.items()}


def _open(opened: Callable[[], Activation], where: Any) -> Activation:
    return masked(opened(), where)


def masked(of: Activation, where: Any) -> MaskedActivation:
    """An activation under a mask; see :meth:`~flexmagic.client.looks.Looks.masked`."""
    from flexmagic.view.masks import mask_for

    if isinstance(of, MaskedActivation):
        where = mask_for(where, of.shape) | of._mask  # noqa: SLF001 - of its kind
    facts, block = (of._facts, of._block) if isinstance(of, Derived) else ({}, None)  # noqa: SLF001
    return MaskedActivation(of, where, facts, block)
