"""Several pictures side by side: facets of one tensor, layers, or two tensors and their difference.

Panes with one ``group`` share their colours, and all of one shape share the window. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from flexmagic.view import scale as colors
from flexmagic.view.picture import ALONE, LAYERS, STEPS, Look, colour, frame, gather, plane_of
from flexmagic.view.pieces import present
from flexmagic.view.plane import MAX_TILE_BYTES, index_of
from flexmagic.view.words import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    from flexmagic.view.picture import Gathered, Picture
    from flexmagic.view.source import Info, Source

MOST_PANES = 16
GAP = 14
LEAST_WIDE, LEAST_WIDE_OF_FEW = 210, 250
TALL_OF_MANY = 200
FEW = 3


@dataclass(frozen=True)
class Wanted:
    """One picture that is to stand on a sheet, in the colours of its ``group``."""

    title: str
    source: Source
    look: Look
    group: int = 0


@runtime_checkable
class SideBySide(Protocol):
    """A source that is several pictures by nature."""

    def wanted(self, look: Look) -> Sequence[Wanted]:
        """Return the pictures that a look at it asks for."""
        ...


@dataclass(frozen=True)
class Pane:
    """One picture on a sheet, and what was looked at."""

    title: str
    source: Source
    picture: Picture


@dataclass(frozen=True)
class Sheet:
    """Pictures side by side.

    ``facet`` says along what (:data:`~flexmagic.view.picture.ALONE` for a single picture), ``first`` and
    ``count`` which of how many.
    """

    panes: tuple[Pane, ...]
    facet: int = ALONE
    first: int = 0
    count: int = 1

    @property
    def lead(self) -> Picture:
        """The first picture."""
        return self.panes[0].picture


def compose_sheet(
    source: Source,
    look: Look,
    layers: Sequence[tuple[str, Callable[[], Source]]] = (),
    steps: Sequence[tuple[str, Callable[[], Source]]] = (),
) -> Sheet:
    """Return the sheet that a look asks for: facets along a dim, ``layers`` or ``steps``, else one picture.

    A source that consists of several (a comparison) says by itself what stands side by side.
    """
    if isinstance(source, SideBySide):
        return _sheet(source.wanted(look), look)
    several = {LAYERS: layers, STEPS: steps}
    facet = facet_of(source.info, look, {along for along, each in several.items() if len(each) > 1})
    if facet == ALONE:
        return _sheet([Wanted("", source, look)], look)
    if facet in several:
        known = several[facet]
        first = _page(look.first, len(known))
        chosen = known[first : first + MOST_PANES]
        each = [Wanted(visible(label), open_one(), look) for label, open_one in chosen]
        return replace(_sheet(each, look), facet=facet, first=first, count=len(known))
    count = source.info.shape[facet]
    first = _page(look.first, count)
    positions = range(first, min(first + MOST_PANES, count))
    name = visible(source.info.dims[facet], 40)
    each = [
        Wanted(f"{name} {at}", source, replace(look, fixed={**look.fixed, facet: at})) for at in positions
    ]
    return replace(_sheet(each, look, facet, positions), facet=facet, first=first, count=count)


def facet_of(info: Info, look: Look, several: Collection[int] = ()) -> int:
    """Return the dim along which pictures stand side by side, one of ``several`` or ALONE; put right."""
    plane = plane_of(info, look)
    free = [d for d in plane.fixed if info.shape[d] > 1]
    if look.facet is None:
        square = plane.rows >= 0 and info.dims[plane.rows] == info.dims[plane.cols] == "seq"
        heads = [d for d in free if info.dims[d] != "batch"]
        return heads[0] if square and heads else ALONE
    if look.facet in several:
        return look.facet
    return look.facet if look.facet in free else ALONE


def _page(first: int, count: int) -> int:
    return min(max(first, 0), max(count - 1, 0)) // MOST_PANES * MOST_PANES


def _sheet(each: Sequence[Wanted], look: Look, facet: int = ALONE, positions: range = range(0)) -> Sheet:
    wide, tall = _room(look, len(each))
    looks = [replace(wanted.look, width=wide, tall=tall) for wanted in each]
    block = _block(each[0].source, looks[0], facet, positions) if positions else None
    found = [
        gather(wanted.source, own, None if block is None else block[i])
        for i, (wanted, own) in enumerate(zip(each, looks, strict=True))
    ]
    scales = {
        group: _common([f for f, w in zip(found, each, strict=True) if w.group == group], look)
        for group in {wanted.group for wanted in each}
    }
    return Sheet(
        tuple(
            Pane(wanted.title, wanted.source, colour(one, scales[wanted.group]))
            for wanted, one in zip(each, found, strict=True)
        )
    )


def _common(found: Sequence[Gathered], look: Look) -> colors.Scale:
    return colors.fit(np.concatenate([one.known for one in found]), look.scale, look.limits)


def _room(look: Look, count: int) -> tuple[int, int]:
    """Return width and greatest height of the map of each of ``count`` pictures."""
    if count == 1:
        return look.width, look.tall
    least = LEAST_WIDE_OF_FEW if count <= FEW else LEAST_WIDE
    beside = min(count, max((look.width + GAP) // (least + GAP), 1))
    return (look.width - (beside - 1) * GAP) // beside, look.tall if count <= FEW else TALL_OF_MANY


def _block(source: Source, look: Look, facet: int, positions: range) -> NDArray[np.generic] | None:
    """Return the tiles of all facets, ``(facets, R, C)``, in one read; None where it takes several."""
    info = source.info
    plane, _, grid = frame(info, look)
    cells = grid.shape[0] * grid.shape[1] * len(positions)
    if not grid.exact or cells * 16 > MAX_TILE_BYTES:
        return None
    index = index_of(info, plane, grid)
    index = (*index[:facet], slice(positions.start, positions.stop), *index[facet + 1 :])
    block = source.read(index)
    if present(source.info, index) is not None:
        return None  # each then says what is missing in it
    kept = sorted({facet, plane.rows, plane.cols} - {ALONE})
    block = np.moveaxis(block, kept.index(facet), 0)
    if plane.rows > plane.cols:
        block = block.swapaxes(1, 2)
    return block.reshape(len(positions), *grid.shape)
