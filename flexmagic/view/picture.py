"""The picture of a plane: what one look asks for, and everything that is drawn and said. Pure.

``compose`` asks the source for one tile or one overview and turns it into codes, limits, counts,
ribbons, holes and labels. Canvas and PNG only paint what stands here, so they cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.view import scale as colors
from flexmagic.view.layout import MAP_TALL, Layout, lay_out
from flexmagic.view.masks import masked_at
from flexmagic.view.pieces import present
from flexmagic.view.plane import (
    Grid,
    Plane,
    clamp_window,
    cut,
    default_plane,
    extent,
    index_of,
    make_plane,
)
from flexmagic.view.reduce import as_real
from flexmagic.view.ribbon import Hole, Segment, holes, ribbons
from flexmagic.view.source import STRIP
from flexmagic.view.words import token

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from flexmagic.view.source import Info, Overview, Peak, Source, Span

ALONE, LAYERS, STEPS = -1, -2, -3
"""No facets; one facet per layer, or per step, that is there to choose from."""
REDUCERS = ("extremum", "mean", "rms")
REDUCER_TEXT = {
    "extremum": "signed extremum (the value of largest magnitude)",
    "mean": "mean",
    "rms": "root mean square",
}
OUTLIER = 6.0
"""Times the root mean square beyond which a value is ringed in an overview."""
SHORT, LONG = 18, 80
"""Characters of a label beside a map, and of a token in a text."""
BIN_PIXELS = 3
"""Size of an overview's cell: smaller ones are seen by nobody and travel all the same."""


@dataclass(frozen=True)
class Look:
    """What somebody wants to see. Whatever does not fit the tensor is put right, never refused.

    ``rows``, ``cols``, ``fixed`` choose the plane (None: by default), ``row_window`` and
    ``col_window`` the part of it (None: all), ``limits`` keeps given ones, ``width`` and ``tall`` are
    the room for a whole picture and for its map, in CSS pixels. ``facet`` is the dim (or
    :data:`LAYERS`, :data:`STEPS` or :data:`ALONE`) whose positions stand side by side, from the
    ``first`` one on; None chooses: the heads of an attention pattern, nothing of anything else.
    """

    rows: int | None = None
    cols: int | None = None
    fixed: Mapping[int, int] = field(default_factory=dict)
    row_window: Span | None = None
    col_window: Span | None = None
    reducer: str = "extremum"
    scale: str = "linear"
    limits: tuple[float, float] | None = None
    width: int = 800
    tall: int = MAP_TALL
    facet: int | None = None
    first: int = 0


@dataclass(frozen=True)
class Counts:
    """What the picture must say about its cells; all are numbers of cells, except ``values``.

    ``values`` are the elements behind the cells, and ``nan_values`` and so on how many of them are
    not finite; ``masked_values`` are not among them.
    """

    cells: int
    values: int
    above: int
    below: int
    nan: int
    posinf: int
    neginf: int
    hole: int
    nan_values: int
    posinf_values: int
    neginf_values: int
    masked: int = 0
    masked_values: int = 0


@dataclass(frozen=True)
class Gathered:
    """What one look has brought, before anything is coloured; see :class:`Picture` for the fields.

    ``values`` is what is drawn, ``(R, C)`` float64: NaN where nothing finite, nothing reached or only
    what is masked is. ``veil`` is True where a cell is masked as a whole.
    """

    info: Info
    plane: Plane
    grid: Grid
    reducer: str
    layout: Layout
    values: NDArray[np.float64]
    row_labels: tuple[str, ...] | None
    col_labels: tuple[str, ...] | None
    tile: NDArray[Any] | None = None
    mask: NDArray[np.bool_] | None = None
    overview: Overview | None = None
    texts: NDArray[np.str_] | None = None
    veil: NDArray[np.bool_] | None = None

    @property
    def known(self) -> NDArray[np.float64]:
        """The values that were reached, from which limits are chosen."""
        return self.values.reshape(-1) if self.mask is None else self.values[self.mask]


@dataclass(frozen=True)
class Picture:
    """A composed picture. ``codes`` is ``(R, C)`` uint8, one per cell of ``grid``.

    ``values`` is what is drawn, as numbers; ``tile`` holds the values of an exact picture, ``overview``
    the bins of any other; ``mask`` is False in holes, ``veil`` True in masked cells. Labels are for
    every position of their dim, or None. ``peaks`` are the outliers of an overview, each exact and in
    its place, and ``texts`` what stands in the cells, if anything.
    """

    info: Info
    plane: Plane
    grid: Grid
    reducer: str
    scale: colors.Scale
    codes: NDArray[np.uint8]
    values: NDArray[np.float64]
    counts: Counts
    layout: Layout
    col_ribbon: tuple[Segment, ...]
    row_ribbon: tuple[Segment, ...]
    holes: tuple[Hole, ...]
    row_labels: tuple[str, ...] | None
    col_labels: tuple[str, ...] | None
    tile: NDArray[Any] | None = None
    mask: NDArray[np.bool_] | None = None
    overview: Overview | None = None
    peaks: tuple[Peak, ...] = ()
    texts: NDArray[np.str_] | None = None
    veil: NDArray[np.bool_] | None = None


def compose(source: Source, look: Look) -> Picture:
    """Ask the source once and return the picture. Raises what the source raises.

    The tensor must have at least one element.
    """
    found = gather(source, look)
    return colour(found, colors.fit(found.known, look.scale, look.limits))


def plane_of(info: Info, look: Look) -> Plane:
    """Return the plane that a look asks for, put right where it does not fit the tensor."""
    plane = default_plane(info)
    if look.rows is not None or look.cols is not None:
        rows = plane.rows if look.rows is None else look.rows
        return make_plane(info, rows, plane.cols if look.cols is None else look.cols, look.fixed)
    return make_plane(info, plane.rows, plane.cols, look.fixed) if look.fixed else plane


def frame(
    info: Info,
    look: Look,
    row_labels: tuple[str, ...] | None = None,
    col_labels: tuple[str, ...] | None = None,
) -> tuple[Plane, Layout, Grid]:
    """Return what is known of a picture before data are asked for: its plane, layout and cells."""
    plane = plane_of(info, look)
    col_ribbon, row_ribbon = ribbons(info, plane)
    layout = lay_out(
        info,
        plane,
        look.width,
        row_labels=row_labels,
        col_labels=col_labels,
        row_ribbon=bool(row_ribbon),
        col_ribbon=bool(col_ribbon),
        tall=look.tall,
    )
    return plane, layout, _grid(info, plane, look, layout)


def gather(source: Source, look: Look, tile: NDArray[Any] | None = None) -> Gathered:
    """Ask the source for a tile or an overview, unless the ``tile`` (R, C) has come already."""
    info = source.info
    plane = plane_of(info, look)
    row_labels, col_labels = (_labels(source, plane, dim) for dim in (plane.rows, plane.cols))
    plane, layout, grid = frame(info, look, row_labels, col_labels)
    reducer = "1:1" if grid.exact else look.reducer if look.reducer in REDUCERS else REDUCERS[0]
    mask, overview = None, None
    if tile is None or tile.shape != grid.shape:
        tile, mask, overview = _fetch(source, info, plane, grid)
    values, veil = _cells(tile, overview, reducer), _veil(source, plane, grid, overview)
    for unseen in (None if mask is None else ~mask, veil):
        values = values if unseen is None else np.where(unseen, np.nan, values)
    return Gathered(
        info=source.info,  # a rank may have died meanwhile; what it owned must not be drawn as data
        plane=plane,
        grid=grid,
        reducer=reducer,
        layout=layout,
        values=values,
        row_labels=row_labels,
        col_labels=col_labels,
        tile=tile,
        mask=mask,
        overview=overview,
        texts=_texts(source, info, plane, grid),
        veil=veil,
    )


def colour(found: Gathered, scale: colors.Scale) -> Picture:
    """Return the picture of what has come, in the colours of ``scale``."""
    codes = _codes(found, scale)
    col_ribbon, row_ribbon = ribbons(found.info, found.plane)
    return Picture(
        info=found.info,
        plane=found.plane,
        grid=found.grid,
        reducer=found.reducer,
        scale=scale,
        codes=codes,
        values=found.values,
        counts=_count(codes, found.mask, found.overview),
        layout=found.layout,
        col_ribbon=col_ribbon,
        row_ribbon=row_ribbon,
        holes=holes(found.info, found.plane),
        row_labels=found.row_labels,
        col_labels=found.col_labels,
        tile=found.tile,
        mask=found.mask,
        overview=found.overview,
        peaks=outliers(found.overview),
        texts=found.texts,
        veil=found.veil,
    )


def outliers(overview: Overview | None) -> tuple[Peak, ...]:
    """Return the peaks of an overview that stand out: beyond six times the root mean square of all."""
    if overview is None or not overview.peaks:
        return ()
    count = overview.finite.astype(np.float64)
    square = (np.square(overview.rms.astype(np.float64)) * count).sum() / max(count.sum(), 1.0)
    limit = OUTLIER * math.sqrt(square)
    return tuple(peak for peak in overview.peaks if abs(peak.value) > limit)


def _texts(source: Source, info: Info, plane: Plane, grid: Grid) -> NDArray[np.str_] | None:
    """Return what the source has to write into the cells of an exact picture, ``(R, C)``."""
    texts: NDArray[np.str_] | None = getattr(source, "texts", None)
    if texts is None or not grid.exact:
        return None
    part = texts[index_of(info, plane, grid)]
    return (part.T if plane.rows > plane.cols else part).reshape(grid.shape)


def _labels(source: Source, plane: Plane, dim: int) -> tuple[str, ...] | None:
    """Return the escaped, shortened labels of every position of ``dim``."""
    texts = source.labels(dim, plane.fixed) if dim >= 0 else None
    if texts is None or len(texts) != source.info.shape[dim]:
        return None
    return tuple(token(text, LONG if source.info.form == STRIP else SHORT) for text in texts)


def _grid(info: Info, plane: Plane, look: Look, layout: Layout) -> Grid:
    rows, cols = extent(info, plane)
    row_window = clamp_window(look.row_window, rows)
    col_window = clamp_window(look.col_window, cols)
    room = (layout.map_height, cols if info.form == STRIP else layout.map_width)
    itemsize = 16 if info.dtype.startswith(("complex", "float64", "int64")) else 4
    grid = cut(row_window, col_window, room, itemsize)
    if grid.exact:
        return grid
    wide = (max(room[0] // BIN_PIXELS, 1), max(room[1] // BIN_PIXELS, 1))
    return cut(row_window, col_window, wide, itemsize)


def _fetch(
    source: Source, info: Info, plane: Plane, grid: Grid
) -> tuple[NDArray[Any] | None, NDArray[np.bool_] | None, Overview | None]:
    """Read the tile, or the overview where there are fewer cells than values."""
    if not grid.exact:
        overview = source.overview(plane.rows, plane.cols, dict(plane.fixed), grid.row_edges, grid.col_edges)
        reached = overview.n > 0
        if overview.masked is not None:
            reached |= overview.masked > 0
        return None, None if reached.all() else reached, overview
    index = index_of(info, plane, grid)
    tile = source.read(index)
    mask = present(source.info, index)  # asked afterwards: a rank may have died meanwhile
    if plane.rows > plane.cols:
        tile, mask = tile.T, None if mask is None else mask.T
    return tile.reshape(grid.shape), None if mask is None else mask.reshape(grid.shape), None


def _cells(tile: NDArray[Any] | None, overview: Overview | None, reducer: str) -> NDArray[np.float64]:
    """Return what is drawn, ``(R, C)`` float64; bins with nothing finite are NaN."""
    if overview is None:
        return as_real(np.asarray(tile))
    values = np.asarray(getattr(overview, reducer), dtype=np.float64)
    return np.where(overview.finite > 0, values, np.nan)


def _veil(source: Source, plane: Plane, grid: Grid, overview: Overview | None) -> NDArray[np.bool_] | None:
    """Return which cells are masked as a whole, ``(R, C)``; None where none is."""
    if overview is not None:
        return None if overview.masked is None else (overview.masked > 0) & (overview.n == 0)
    veil = masked_at(source, index_of(source.info, plane, grid))
    if veil is None:
        return None
    return (veil.T if plane.rows > plane.cols else veil).reshape(grid.shape)


def _codes(found: Gathered, scale: colors.Scale) -> NDArray[np.uint8]:
    """Return the codes; a bin with a single NaN or infinity among its values shows its mark."""
    overview, mask = found.overview, found.mask
    codes = colors.encode(found.values, scale)
    if overview is not None:
        codes[overview.neginf > 0] = colors.NEGINF
        codes[overview.posinf > 0] = colors.POSINF
        codes[overview.nan > 0] = colors.NAN
    if found.veil is not None:
        codes[found.veil] = colors.MASKED
    if mask is not None:
        codes[~mask] = colors.HOLE
    return codes


def _count(
    codes: NDArray[np.uint8],
    mask: NDArray[np.bool_] | None,
    overview: Overview | None,
) -> Counts:
    def cells(code: int) -> int:
        return int(np.count_nonzero(codes == code))

    marks = {name: cells(code) for name, code in _MARKS.items()}
    if overview is not None:
        values = int(overview.n.sum())
        each = {name: getattr(overview, name) for name in _MARKS}
        odd = {name: 0 if counts is None else int(counts.sum()) for name, counts in each.items()}
    else:
        values = int(codes.size) if mask is None else int(mask.sum())
        values -= marks["masked"]
        odd = marks
    return Counts(
        cells=int(codes.size),
        values=values,
        above=cells(colors.OVER),
        below=cells(colors.UNDER),
        hole=cells(colors.HOLE),
        **marks,
        **{f"{name}_values": count for name, count in odd.items()},
    )


_MARKS = {"nan": colors.NAN, "posinf": colors.POSINF, "neginf": colors.NEGINF, "masked": colors.MASKED}
