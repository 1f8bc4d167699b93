"""Reductions that turn a tensor into something a screen can hold. Pure, numpy alone.

These are the oracle: an engine that reduces its own piece elsewhere must agree with them. They
are linear in the data and hold a single row of bins at a time, so memory stays small.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.view.source import Change, Overview, Peak, Stats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

FLOAT32_MAX = float(np.finfo(np.float32).max)
CHUNK = 1 << 20
"""Elements that are looked at in double precision at a time."""
MOST_PEAKS = 32
"""Elements of largest magnitude that an overview names one by one."""


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
    origin: tuple[int, int] = (0, 0),
    masked: NDArray[np.bool_] | None = None,
) -> Overview:
    """Reduce ``values`` (2-d, any dtype) to bins between the edges.

    Edges are non-decreasing positions in ``values``; bins of no width have ``n == 0``. ``origin`` is
    the global position of ``values[0, 0]``, by which peaks are named. What is ``masked`` (of the shape of
    ``values``) is counted as that and as nothing else. Raises ``ValueError`` if edges leave the array.
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
        band = slice(int(row_edges[r]), int(row_edges[r + 1]))
        x = as_real(window[band])
        finite = np.isfinite(x)
        if masked is not None:
            hidden = masked[band, col_edges[0] : col_edges[-1]]
            sums.masked[r, filled] = np.add.reduceat(hidden.sum(axis=0), starts)
            x, finite = np.where(hidden, 0.0, x), finite & ~hidden
        if not finite.all():
            marks = ((sums.nan, np.isnan(x)), (sums.posinf, x == np.inf), (sums.neginf, x == -np.inf))
            for counts, mark in marks:
                counts[r, filled] = np.add.reduceat(mark.sum(axis=0), starts)
        kept = np.where(finite, x, 0.0)
        at = (origin[0] + int(row_edges[r]), origin[1] + int(col_edges[0]))
        sums.peaks = largest([*sums.peaks, *_peaks(kept, at, sums.peaks)])
        high = np.maximum.reduceat(np.where(finite, x, -np.inf).max(axis=0), starts)
        low = np.minimum.reduceat(np.where(finite, x, np.inf).min(axis=0), starts)
        sums.n[r, filled] = np.diff(col_edges)[filled] * len(x) - sums.masked[r, filled]
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
        if part.masked is not None:
            sums.masked += part.masked
    sums.extremum = np.where(high >= -low, high, low)
    sums.peaks = largest([peak for part in parts for peak in part.peaks])
    return sums.finish(parts[0].row_edges, parts[0].col_edges)


def largest(peaks: Sequence[Peak], most: int = MOST_PEAKS) -> tuple[Peak, ...]:
    """Return the peaks of largest magnitude, those first; ties go by position, whoever found them."""
    return tuple(sorted(peaks, key=lambda peak: (-abs(peak.value), peak.row, peak.col))[:most])


def _peaks(kept: NDArray[np.float64], at: tuple[int, int], known: Sequence[Peak]) -> list[Peak]:
    """Return the peaks of one band of rows that may outdo the ``known`` ones."""
    size = np.abs(kept)
    least = abs(known[-1].value) if len(known) == MOST_PEAKS else 0.0
    if not size.size or size.max() <= least:
        return []
    flat = size.reshape(-1)
    if len(known) < MOST_PEAKS < flat.size:  # ties at the limit go by position: all that reach it
        limit = np.partition(flat, flat.size - MOST_PEAKS)[flat.size - MOST_PEAKS]
        found = np.flatnonzero((flat >= limit) & (flat > 0))
    else:
        found = np.flatnonzero(flat > least)
    if found.size > MOST_PEAKS:
        found = found[np.lexsort((found, -flat[found]))][:MOST_PEAKS]
    width = kept.shape[1]
    values = kept.reshape(-1)
    return [Peak(at[0] + i // width, at[1] + i % width, float(values[i])) for i in found.tolist()]


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
    masked: NDArray[np.int32]
    peaks: tuple[Peak, ...] = ()

    @classmethod
    def empty(cls, rows: int, cols: int) -> _Sums:
        """Return zeros for so many bins."""
        shape = (rows, cols)
        total, square, extremum = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        n, nan, posinf, neginf, masked = (np.zeros(shape, dtype=np.int32) for _ in range(5))
        return cls(total, square, extremum, n, nan, posinf, neginf, masked)

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
            peaks=self.peaks,
            masked=self.masked if self.masked.any() else None,
        )


def compute_stats(values: NDArray[Any], masked: NDArray[np.bool_] | None = None) -> Stats:
    """Return the statistics of an array of any shape and dtype, in little more memory than it has.

    What is ``masked`` (of the same shape) is counted as that and as nothing else.
    """
    if masked is not None:
        return replace(compute_stats(values[~masked]), masked=int(masked.sum()))
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
        masked=sum(part.masked for part in parts),
    )


def bin_edges(low: float, high: float, bins: int = 40) -> NDArray[np.float64]:
    """Return the edges of equal bins from ``low`` to ``high``; no bin where either is not finite."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return np.zeros(1)
    if low == high:
        wide = max(abs(low) * 1e-3, 1e-12)
        low, high = low - wide, high + wide
    # In halves, so that the distance cannot overflow.
    return np.linspace(low / 2, high / 2, bins + 1) * 2


def count_between(values: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how many finite values each bin has: ``edges[i] <= x < edges[i + 1]``, the last one closed."""
    counts = np.zeros(max(len(edges) - 1, 0), dtype=np.int64)
    if not counts.size:
        return counts
    flat = values.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        x = as_real(flat[start : start + CHUNK])
        x = x[np.isfinite(x)]
        at = np.searchsorted(edges, x, side="right") - 1
        at[x == edges[-1]] = len(counts) - 1
        counts += np.bincount(at[(at >= 0) & (at < len(counts))], minlength=len(counts))
    return counts


def compare_values(a: NDArray[Any], b: NDArray[Any], same: NDArray[np.bool_]) -> Change:
    """Return how ``b`` differs from ``a``; ``same`` says which elements have equal bits."""
    wide = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
    x, y = a.astype(wide), b.astype(wide)
    both = np.isfinite(x) & np.isfinite(y)
    with np.errstate(over="ignore", invalid="ignore"):
        delta = np.abs(y[both] - x[both])
        base = np.square(np.abs(x[both])).sum()
    return Change(
        n=int(x.size),
        same=int(same.sum()),
        odd=int((~both & ~same).sum()),
        largest=float(delta.max()) if delta.size else math.nan,
        square=float(np.square(delta).sum()),
        base=float(base),
    )


def merge_changes(parts: Sequence[Change]) -> Change:
    """Join the changes of disjoint pieces into that of the whole."""
    return Change(
        n=sum(part.n for part in parts),
        same=sum(part.same for part in parts),
        odd=sum(part.odd for part in parts),
        largest=max((p.largest for p in parts if not math.isnan(p.largest)), default=math.nan),
        square=sum(part.square for part in parts),
        base=sum(part.base for part in parts),
    )


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which elements of two arrays of one shape and dtype have equal bits, same shape."""
    if not a.size:
        return np.zeros(a.shape, dtype=bool)
    x, y = (np.ascontiguousarray(v).view(np.uint8).reshape(*v.shape, v.dtype.itemsize) for v in (a, b))
    equal: NDArray[np.bool_] = (x == y).all(axis=-1)
    return equal


def digest_of(raw: Any) -> str:
    """Return a digest of some bytes: equal ones mean equal bits, as far as anybody can tell."""
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def difference_dtype(a: str, b: str) -> str:
    """Return the dtype of a difference, by torch's name: wide enough that nothing is lost in storing it."""
    kinds = {a, b}
    if any(kind.startswith("complex") for kind in kinds):
        return "complex128" if kinds & {"complex128", "float64"} else "complex64"
    if all(kind == "bool" or kind.startswith(("int", "uint")) for kind in kinds):
        return "int64"
    return "float64" if kinds & {"float64", "int64"} else "float32"


def subtract(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Return ``b - a`` in the dtype that :func:`difference_dtype` names."""
    wide = np.dtype(difference_dtype(a.dtype.name, b.dtype.name))
    with np.errstate(over="ignore", invalid="ignore"):
        out: NDArray[Any] = b.astype(wide) - a.astype(wide)
    return out
