"""Which two dims are looked at, which part of them, and in how many cells. Pure, numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from flexmagic.view.source import Index, Info, Span

NO_DIM = -1
MAX_BINS = 1 << 15
"""Cells of an overview: seven reduced arrays of that many cells stay below 1 MB."""
MAX_TILE_BYTES = 1_000_000


@dataclass(frozen=True)
class Plane:
    """Dims along the rows and columns of the picture, and where one stands in all others.

    ``rows`` is :data:`NO_DIM` for tensors of one dim, ``cols`` too for a single number.
    """

    rows: int
    cols: int
    fixed: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A window of a plane, cut into cells: cell ``[r, c]`` spans consecutive edges.

    ``exact`` says that every cell is one element.
    """

    row_edges: NDArray[np.int64]
    col_edges: NDArray[np.int64]

    @property
    def exact(self) -> bool:
        """Whether every cell is one element, so that no reducer comes between."""
        return all(len(e) - 1 == e[-1] - e[0] for e in (self.row_edges, self.col_edges))

    @property
    def rows(self) -> Span:
        """Global positions covered by the rows."""
        return int(self.row_edges[0]), int(self.row_edges[-1])

    @property
    def cols(self) -> Span:
        """Global positions covered by the columns."""
        return int(self.col_edges[0]), int(self.col_edges[-1])

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells, rows x columns."""
        return len(self.row_edges) - 1, len(self.col_edges) - 1


def default_plane(info: Info) -> Plane:
    """Choose rows and columns: the last dim across, the sequence (else its neighbour) down.

    An attention pattern (…, seq, seq) thus shows its two sequence dims; all else is at index 0.
    """
    ndim = len(info.shape)
    if ndim == 0:
        return Plane(NO_DIM, NO_DIM)
    cols = ndim - 1
    named = [d for d in range(cols) if info.dims[d] == "seq"]
    rows = named[-1] if named else cols - 1
    return make_plane(info, rows, cols, {})


def make_plane(info: Info, rows: int, cols: int, fixed: Mapping[int, int]) -> Plane:
    """Return a plane of these dims, with whatever is impossible put right.

    What a browser asks for may belong to a tensor that was shown before: dims that do not exist
    fall back to the default ones, indices are clamped into their dim.
    """
    ndim = len(info.shape)
    if ndim == 0:
        return Plane(NO_DIM, NO_DIM)
    if ndim == 1:
        return Plane(NO_DIM, 0)
    if not (0 <= rows < ndim and 0 <= cols < ndim) or rows == cols:
        return default_plane(info)
    others = (d for d in range(ndim) if d not in (rows, cols))
    return Plane(rows, cols, {d: min(max(fixed.get(d, 0), 0), max(info.shape[d] - 1, 0)) for d in others})


def extent(info: Info, plane: Plane) -> tuple[int, int]:
    """Return the size of the plane, rows x columns; a dim that is not there has one position."""
    return (
        info.shape[plane.rows] if plane.rows >= 0 else 1,
        info.shape[plane.cols] if plane.cols >= 0 else 1,
    )


def clamp_window(window: Span | None, extent_of_dim: int) -> Span:
    """Return a window inside ``[0, extent)`` with at least one position; None is all of it."""
    if window is None:
        return 0, extent_of_dim
    start = min(max(int(window[0]), 0), max(extent_of_dim - 1, 0))
    return start, min(max(int(window[1]), start + 1), extent_of_dim)


def cut(rows: Span, cols: Span, most: tuple[int, int], itemsize: int) -> Grid:
    """Cut a window into at most ``most`` = (rows, columns) cells.

    It is exact where every element gets a cell of its own and the elements (``itemsize`` bytes
    each) fit one tile; otherwise there are at most :data:`MAX_BINS` cells of nearly equal width.
    """
    sizes = (rows[1] - rows[0], cols[1] - cols[0])
    fits = all(have <= room for have, room in zip(sizes, most, strict=True))
    if fits and sizes[0] * sizes[1] * itemsize <= MAX_TILE_BYTES:
        return Grid(_edges(rows, sizes[0]), _edges(cols, sizes[1]))
    bins = [max(min(have, room), 1) for have, room in zip(sizes, most, strict=True)]
    if bins[0] * bins[1] > MAX_BINS:
        shrink = math.sqrt(MAX_BINS / (bins[0] * bins[1]))
        bins = [max(int(count * shrink), 1) for count in bins]
        # One of them may have hit the floor of a single bin: the other then has to give way.
        bins = [min(bins[0], MAX_BINS // bins[1]), min(bins[1], MAX_BINS // bins[0])]
    return Grid(_edges(rows, bins[0]), _edges(cols, bins[1]))


def _edges(window: Span, bins: int) -> NDArray[np.int64]:
    start, stop = window
    return start + np.arange(bins + 1, dtype=np.int64) * (stop - start) // max(bins, 1)


def index_of(info: Info, plane: Plane, grid: Grid) -> Index:
    """Return the index that reads the window of the plane, in the order of the tensor's dims."""
    spans = {plane.rows: grid.rows, plane.cols: grid.cols}
    return tuple(slice(*spans[d]) if d in spans else plane.fixed[d] for d in range(len(info.shape)))
