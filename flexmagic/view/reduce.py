"""Reductions that turn a tensor into something a screen can hold. Pure, numpy alone.

These are the oracle: an engine that reduces its own piece elsewhere must agree with them. They
are linear in the data and hold a single row of bins at a time, so memory stays small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.view.source import Overview, Stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FLOAT32_MAX = float(np.finfo(np.float32).max)
CHUNK = 1 << 20
"""Elements that are looked at in double precision at a time."""


def local_edges(edges: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    """Move global bin ``edges`` into a piece that owns ``[start, stop)``.

    Bins that the piece does not touch become empty, which :func:`reduce_overview` allows; so the
    pieces of all ranks have the same bins and merge one by one.
    """
    return np.clip(np.asarray(edges, dtype=np.int64), start, stop) - start


def as_real(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return what is drawn of ``values``: float64 of the same shape, the magnitude of complex."""
    if np.iscomplexobj(values):
        return np.abs(values).astype(np.float64)
    return values.astype(np.float64)


def reduce_overview(
    values: NDArray[Any],
    row_edges: NDArray[np.int64],
    col_edges: NDArray[np.int64],
) -> Overview:
    """Reduce ``values`` (2-d, any dtype) to bins between the edges.

    Edges are non-decreasing positions in ``values``; bins of no width have ``n == 0``. Raises
    ``ValueError`` if they leave the array.
    """
    row_edges = np.asarray(row_edges, dtype=np.int64)
    col_edges = np.asarray(col_edges, dtype=np.int64)
    for edges, size in ((row_edges, values.shape[0]), (col_edges, values.shape[1])):
        if len(edges) and (edges[0] < 0 or edges[-1] > size or np.any(np.diff(edges) < 0)):
            msg = f"bin edges {edges[0]}..{edges[-1]} must ascend within 0..{size}"
            raise ValueError(msg)
    sums = _Sums.empty(max(len(row_edges) - 1, 0), max(len(col_edges) - 1, 0))
    filled = np.flatnonzero(np.diff(col_edges) > 0)
    if not filled.size:
        return sums.finish(row_edges, col_edges)
    # Bins that are not empty tile the window without gaps: their starts are all reduceat needs.
    starts = col_edges[filled] - col_edges[0]
    window = values[:, col_edges[0] : col_edges[-1]]
    for r in np.flatnonzero(np.diff(row_edges) > 0):
        x = as_real(window[row_edges[r] : row_edges[r + 1]])
        finite = np.isfinite(x)
        if not finite.all():
            marks = ((sums.nan, np.isnan(x)), (sums.posinf, x == np.inf), (sums.neginf, x == -np.inf))
            for counts, mark in marks:
                counts[r, filled] = np.add.reduceat(mark.sum(axis=0), starts)
        kept = np.where(finite, x, 0.0)
        high = np.maximum.reduceat(np.where(finite, x, -np.inf).max(axis=0), starts)
        low = np.minimum.reduceat(np.where(finite, x, np.inf).min(axis=0), starts)
        sums.n[r, filled] = np.diff(col_edges)[filled] * len(x)
        sums.total[r, filled] = np.add.reduceat(kept.sum(axis=0), starts)
        with np.errstate(over="ignore"):
            sums.square[r, filled] = np.add.reduceat((kept * kept).sum(axis=0), starts)
        sums.extremum[r, filled] = np.where(high >= -low, high, low)
    return sums.finish(row_edges, col_edges)


def merge_overviews(parts: Sequence[Overview]) -> Overview:
    """Join reductions of disjoint pieces over the same bins into that of the whole.

    Means and squares merge by the number of finite elements, the extremum by magnitude, counts add.
    Raises ``ValueError`` for no parts, or parts with different bins.
    """
    if not parts or any(part.n.shape != parts[0].n.shape for part in parts):
        msg = "overviews can be merged only if there is one and all have the same bins"
        raise ValueError(msg)
    sums = _Sums.empty(*parts[0].n.shape)
    high, low = np.full(parts[0].n.shape, -np.inf), np.full(parts[0].n.shape, np.inf)
    for part in parts:
        count = part.finite
        sums.total += part.mean.astype(np.float64) * count
        sums.square += np.square(part.rms.astype(np.float64)) * count
        high = np.where(count > 0, np.maximum(high, part.extremum), high)
        low = np.where(count > 0, np.minimum(low, part.extremum), low)
        sums.n += part.n
        sums.nan += part.nan
        sums.posinf += part.posinf
        sums.neginf += part.neginf
    sums.extremum = np.where(high >= -low, high, low)
    return sums.finish(parts[0].row_edges, parts[0].col_edges)


@dataclass
class _Sums:
    """What is added up before dividing: all ``(R, C)``, sums float64, counts int32."""

    total: NDArray[np.float64]
    square: NDArray[np.float64]
    extremum: NDArray[np.float64]
    n: NDArray[np.int32]
    nan: NDArray[np.int32]
    posinf: NDArray[np.int32]
    neginf: NDArray[np.int32]

    @classmethod
    def empty(cls, rows: int, cols: int) -> _Sums:
        """Return zeros for so many bins."""
        shape = (rows, cols)
        total, square, extremum = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        n, nan, posinf, neginf = (np.zeros(shape, dtype=np.int32) for _ in range(4))
        return cls(total, square, extremum, n, nan, posinf, neginf)

    def finish(self, row_edges: NDArray[np.int64], col_edges: NDArray[np.int64]) -> Overview:
        """Divide by the counts and saturate to float32."""
        finite = self.n - self.nan - self.posinf - self.neginf
        divisor = np.maximum(finite, 1)

        def narrow(values: NDArray[np.float64]) -> NDArray[np.float32]:
            inside = np.clip(np.where(finite > 0, values, 0.0), -FLOAT32_MAX, FLOAT32_MAX)
            return inside.astype(np.float32)

        return Overview(
            row_edges=row_edges,
            col_edges=col_edges,
            mean=narrow(self.total / divisor),
            rms=narrow(np.sqrt(self.square / divisor)),
            extremum=narrow(self.extremum),
            n=self.n,
            nan=self.nan,
            posinf=self.posinf,
            neginf=self.neginf,
        )


def compute_stats(values: NDArray[Any]) -> Stats:
    """Return the statistics of an array of any shape and dtype, in little more memory than it has."""
    if values.size > CHUNK:
        flat = values.reshape(-1)
        chunks = range(0, flat.size, CHUNK)
        return merge_stats([compute_stats(flat[start : start + CHUNK]) for start in chunks])
    x = as_real(values)
    finite = x[np.isfinite(x)]
    some = finite.size > 0
    return Stats(
        n=int(x.size),
        nan=int(np.isnan(x).sum()),
        posinf=int((x == np.inf).sum()),
        neginf=int((x == -np.inf).sum()),
        zeros=int((x == 0).sum()),
        min=float(finite.min()) if some else math.nan,
        max=float(finite.max()) if some else math.nan,
        mean=float(finite.mean()) if some else math.nan,
        std=float(finite.std()) if some else math.nan,
    )


def merge_stats(parts: Sequence[Stats]) -> Stats:
    """Join the statistics of disjoint pieces into those of the whole."""
    weights = [part.n - part.nan - part.posinf - part.neginf for part in parts]
    finite = sum(weights)
    known = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    mean = sum(part.mean * weight for part, weight in known) / finite if finite else math.nan
    # Around the common mean, not as E[x^2] - mean^2: that loses all digits when |mean| >> std.
    square = sum((part.std**2 + (part.mean - mean) ** 2) * weight for part, weight in known)
    return Stats(
        n=sum(part.n for part in parts),
        nan=sum(part.nan for part in parts),
        posinf=sum(part.posinf for part in parts),
        neginf=sum(part.neginf for part in parts),
        zeros=sum(part.zeros for part in parts),
        min=min((part.min for part, _ in known), default=math.nan),
        max=max((part.max for part, _ in known), default=math.nan),
        mean=mean,
        std=math.sqrt(square / finite) if finite else math.nan,
    )
