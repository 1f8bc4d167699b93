"""Which rank owns which part of the plane, and where nothing can be reached. Pure, numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from flexmagic.view.words import ranks as name_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flexmagic.view.plane import Plane
    from flexmagic.view.source import Info, Piece, Span

OKABE_ITO = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167),
    (86, 180, 233), (213, 94, 0), (240, 228, 66), (90, 90, 90),
)  # fmt: skip
"""Colours of ranks, told apart by every common form of colour blindness (Okabe and Ito, 2008)."""
_BRIGHT = 0.36


@dataclass(frozen=True)
class Segment:
    """A stretch of one dim with the ranks that own it; ``color`` counts the distinct owners.

    ``copies``: how many ranks hold every value of it (or every summand, where ``summed``).
    """

    start: int
    stop: int
    ranks: tuple[int, ...]
    color: int
    missing: bool = False
    copies: int = 1
    summed: bool = False

    @property
    def text(self) -> str:
        """What is printed on the stretch: ``ranks 0, 1 ×2`` for replicas."""
        name = f"sum of {name_ranks(self.ranks)}" if self.summed else name_ranks(self.ranks)
        many = f" ×{self.copies}" if self.copies > 1 else ""
        return name + many + (" missing" if self.missing else "")

    @property
    def short(self) -> str:
        """What is printed where there is no room for :attr:`text`."""
        many = f"×{self.copies}" if self.copies > 1 else ""
        return ("+" if self.summed else ",").join(str(rank) for rank in self.ranks) + many

    @property
    def hatched(self) -> bool:
        """Whether the colour has been used before, so that a pattern tells the two apart."""
        return self.color >= len(OKABE_ITO)


@dataclass(frozen=True)
class Hole:
    """A box of the plane whose owners cannot answer: spans of rows and columns, and their names."""

    rows: Span
    cols: Span
    ranks: tuple[int, ...]

    @property
    def text(self) -> str:
        """What is printed on the hole."""
        return f"{name_ranks(self.ranks)} missing"


def fill(color: int) -> tuple[int, int, int]:
    """Return the colour of the n-th owner."""
    return OKABE_ITO[color % len(OKABE_ITO)]


def ink(color: int) -> tuple[int, int, int]:
    """Return black or white, whichever is readable on the n-th owner's colour."""
    return ink_on(fill(color))


def ink_on(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever is readable on a colour."""
    red, green, blue = (c / 255 for c in color)
    bright = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return (0, 0, 0) if bright > _BRIGHT / 2 else (255, 255, 255)


def here(info: Info, plane: Plane) -> list[Piece]:
    """Return the pieces that reach into the plane."""
    return [
        piece
        for piece in info.pieces
        if all(piece.spans[d][0] <= at < piece.spans[d][1] for d, at in plane.fixed.items())
        and all(start < stop for start, stop in piece.spans)
    ]


def ribbon(info: Info, plane: Plane, dim: int) -> tuple[Segment, ...]:
    """Return the owners along ``dim`` of the plane, in order and without gaps between them.

    A stretch that several ranks own (replicas, or a split along the other dim) names all of them.
    It is missing when none of them can answer.
    """
    pieces = here(info, plane)
    if dim < 0 or not pieces:
        return ()
    # One sweep along the dim: a rank may own thousands of stretches of it.
    edges: dict[int, list[tuple[Piece, int]]] = {}
    for piece in pieces:
        start, stop = piece.spans[dim]
        edges.setdefault(start, []).append((piece, 1))
        edges.setdefault(stop, []).append((piece, -1))
    ranks: dict[int, int] = {}
    boxes: dict[tuple[tuple[Span, ...], int], int] = {}
    stretches: list[tuple[int, _Owned]] = []
    for cut in sorted(edges):
        for piece, change in edges[cut]:
            _add(ranks, piece.rank, change)
            _add(boxes, (piece.spans, piece.addend), change)
        owned = _Owned(tuple(sorted(ranks)), _equal(boxes.values()), len({addend for _, addend in boxes}) > 1)
        if not stretches or stretches[-1][1] != owned:
            stretches.append((cut, owned))
    groups = sorted({owned.ranks for _, owned in stretches if owned.ranks})
    alone = all(len(group) == 1 for group in groups)
    known = {group: group[0] if alone else n for n, group in enumerate(groups)}
    lost = set(info.missing_ranks)
    return tuple(
        Segment(
            start,
            stop,
            owned.ranks,
            known[owned.ranks],
            lost.issuperset(owned.ranks),
            owned.copies,
            owned.summed,
        )
        for (start, owned), (stop, _) in pairwise(stretches)
        if owned.ranks
    )


class _Owned(NamedTuple):
    """Who owns a stretch, how many hold each value of it, and whether they hold summands."""

    ranks: tuple[int, ...]
    copies: int
    summed: bool


Counted = TypeVar("Counted")


def _add(counts: dict[Counted, int], what: Counted, change: int) -> None:
    """Count up or down, keeping only what there is."""
    now = counts.get(what, 0) + change
    if now:
        counts[what] = now
    else:
        del counts[what]


def _equal(counts: Iterable[int]) -> int:
    """Return the count that all have in common, else 1."""
    found = set(counts)
    return found.pop() if len(found) == 1 else 1


def ribbons(info: Info, plane: Plane) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Return the ribbons of the columns and of the rows; a dim that is not split has none.

    Where neither is split, the columns' ribbon is one stretch that names everyone who has it.
    """
    cols, rows = ribbon(info, plane, plane.cols), ribbon(info, plane, plane.rows)
    if len(rows) > 1:
        return (cols if len(cols) > 1 else ()), rows
    return cols, ()


def holes(info: Info, plane: Plane) -> tuple[Hole, ...]:
    """Return what nobody reachable owns, as boxes that do not overlap."""
    if not info.missing_ranks or plane.cols < 0:
        return ()
    pieces = here(info, plane)
    boxes = [(p, (0, 1) if plane.rows < 0 else p.spans[plane.rows], p.spans[plane.cols]) for p in pieces]
    row_cuts = sorted({edge for _, span, _ in boxes for edge in span})
    col_cuts = sorted({edge for _, _, span in boxes for edge in span})
    reached = np.zeros((len(row_cuts), len(col_cuts)), dtype=bool)
    for piece, rows, cols in boxes:
        if piece.rank not in info.missing_ranks:
            reached[_between(row_cuts, rows), _between(col_cuts, cols)] = True
    found: dict[tuple[Span, Span], set[int]] = {}
    for piece, rows, cols in boxes:
        r, c = _between(row_cuts, rows), _between(col_cuts, cols)
        if piece.rank not in info.missing_ranks or reached[r, c].all():
            continue
        if not reached[r, c].any():
            found.setdefault((rows, cols), set()).add(piece.rank)
            continue
        for i, j in np.argwhere(~reached[r, c]).tolist():
            a, b = r.start + i, c.start + j
            cell = (row_cuts[a], row_cuts[a + 1]), (col_cuts[b], col_cuts[b + 1])
            found.setdefault(cell, set()).add(piece.rank)
    return tuple(Hole(rows, cols, tuple(sorted(who))) for (rows, cols), who in sorted(found.items()))


def _between(cuts: list[int], span: Span) -> slice:
    return slice(cuts.index(span[0]), cuts.index(span[1]))
