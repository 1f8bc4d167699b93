"""How two tensors differ, whatever they are: counted tile by tile, and as a tensor of its own. Pure.

Sources that know each other (two captures on the same engines) count and subtract where their data
are; any others are read in tiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.view.masks import masked_at
from flexmagic.view.pieces import present
from flexmagic.view.reduce import (
    compare_values,
    compute_stats,
    difference_dtype,
    merge_changes,
    merge_overviews,
    merge_stats,
    reduce_overview,
    same_bits,
    subtract,
)
from flexmagic.view.source import Change, Comparable, Info, Mortal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from flexmagic.view.source import Index, Listener, Overview, Source, Stats

TILE = 1 << 20
"""Elements of each tensor that are in memory at a time."""
CLOSE = 1e-5
"""A relative change up to which two tensors that are not equal count as close."""


def tiles(shape: Sequence[int], most: int = TILE) -> Iterator[tuple[slice, ...]]:
    """Yield indices of boxes of at most ``most`` elements (or one line) that cover a shape once."""
    whole = tuple(slice(0, n) for n in shape)
    if math.prod(shape) <= most:
        yield whole
        return
    dim = max(range(len(shape)), key=lambda d: (math.prod(shape[d + 1 :]) <= most, -d))
    inner = math.prod(shape[dim + 1 :])
    step = max(most // max(inner, 1), 1)
    for at in np.ndindex(*shape[:dim]):
        for start in range(0, shape[dim], step):
            box = slice(start, min(start + step, shape[dim]))
            yield (*(slice(i, i + 1) for i in at), box, *whole[dim + 1 :])


def change_between(a: Source, b: Source) -> Change:
    """Return how B differs from A, without what a missing rank alone holds or what is masked; of one shape.

    Counted where the data are if the two know each other; else both are read once, in tiles.
    """
    known = a.change_to(b) if isinstance(a, Comparable) else None
    if known is not None:
        return known
    parts = []
    for index in tiles(a.info.shape):
        x, y = a.read(index), b.read(index)
        there = _compared(a, b, index)
        if there is not None:
            x, y = x[there], y[there]
        # Narrow floats arrive widened, all in the same way: equal bits stay equal bits.
        same = same_bits(x, y) if x.dtype == y.dtype else np.zeros(x.shape, dtype=bool)
        parts.append(compare_values(x, y, same))
    return merge_changes(parts)


def _compared(a: Source, b: Source, index: Index) -> NDArray[np.bool_] | None:
    """Return which elements are there and masked in neither; None for all."""
    there, masked = _reached(a.info, b.info, index), _masked(a, b, index)
    if masked is None:
        return there
    return ~masked if there is None else there & ~masked


def _masked(a: Source, b: Source, index: Index) -> NDArray[np.bool_] | None:
    masks = [mask for mask in (masked_at(a, index), masked_at(b, index)) if mask is not None]
    return np.logical_or.reduce(masks) if masks else None


def _reached(a: Info, b: Info, index: Index) -> NDArray[np.bool_] | None:
    masks = [mask for mask in (present(a, index), present(b, index)) if mask is not None]
    return np.logical_and.reduce(masks) if masks else None


def relative(change: Change) -> float:
    """Return ||B-A|| / ||A|| over what is finite in both; infinite where A is zero and B is not."""
    if not change.square:
        return 0.0
    return math.sqrt(change.square) / math.sqrt(change.base) if change.base else math.inf


def verdict(change: Change) -> str:
    """Say in words how equal two tensors are: bit-equal, close, different; odd elements in any case."""
    if change.same == change.n:
        return "bit-equal"
    odd = f", {change.odd:,} not finite in one or both" if change.odd else ""
    if not change.odd and relative(change) <= CLOSE:
        return f"close, not bit-equal: {change.n - change.same:,} of {change.n:,} differ"
    return f"different: {change.n - change.same:,} of {change.n:,} differ{odd}"


def difference(a: Source, b: Source) -> Source:
    """Return B - A as a tensor that can be looked at; both have one shape."""
    known = a.difference_to(b) if isinstance(a, Comparable) else None
    return known if known is not None else Difference(a, b)


@dataclass
class Difference:
    """B - A of two sources of one shape, subtracted where it is looked at. A :class:`Source`."""

    a: Source
    b: Source

    @property
    def info(self) -> Info:
        """Facts of B, with what is missing in either; ranks are named if both lie in the same way."""
        a, b = self.a.info, self.b.info
        lost = [f"{which}: rank {', '.join(map(str, i.missing_ranks))} cannot answer, left out"
                for which, i in (("A", a), ("B", b)) if i.missing_ranks]  # fmt: skip
        alike = a.pieces == b.pieces and not lost and not (a.partial or b.partial)
        return replace(
            b, dtype=difference_dtype(a.dtype, b.dtype), mesh="", placements=(), hook="", run="B - A",
            step=None, pieces=b.pieces if alike else (), nbytes=0, partial=False, warnings=tuple(lost),
            missing_ranks=(),
        )  # fmt: skip

    @property
    def bytes_moved(self) -> int:
        """Bytes that looking at either has moved."""
        return self.a.bytes_moved + self.b.bytes_moved

    def read(self, index: Index) -> NDArray[Any]:
        """Return B - A; NaN where either is missing."""
        x, y = self.a.read(index), self.b.read(index)
        delta = subtract(x, y)
        there = _reached(self.a.info, self.b.info, index)
        if there is not None:
            delta = np.where(there, delta.astype(np.result_type(delta, np.float32)), np.nan)
        return delta

    def masked_at(self, index: Index) -> NDArray[np.bool_] | None:
        """Return which elements are masked in either."""
        return _masked(self.a, self.b, index)

    def stats(self) -> Stats:
        """Return the statistics of B - A; reads both once, in tiles."""
        each = tiles(self.info.shape)
        return merge_stats([compute_stats(self.read(index), self.masked_at(index)) for index in each])

    def overview(
        self,
        rows: int,
        cols: int,
        fixed: dict[int, int],
        row_edges: NDArray[np.int64],
        col_edges: NDArray[np.int64],
    ) -> Overview:
        """Reduce B - A to bins; reads the window of both, one band of rows of bins at a time."""
        ndim = len(self.info.shape)
        step = max(TILE // max(int(col_edges[-1] - col_edges[0]), 1), 1)
        parts = []
        for start in range(int(row_edges[0]), int(row_edges[-1]), step):
            stop = min(start + step, int(row_edges[-1]))
            spans = {rows: slice(start, stop), cols: slice(int(col_edges[0]), int(col_edges[-1]))}
            index = tuple(spans[d] if d in spans else fixed[d] for d in range(ndim))
            band, masked = (
                None if part is None else part[None] if rows < 0 else part.T if rows > cols else part
                for part in (self.read(index), self.masked_at(index))
            )
            assert band is not None  # it was read
            local = np.clip(row_edges, start, stop) - start
            origin = start, int(col_edges[0])
            parts.append(reduce_overview(band, local, col_edges - col_edges[0], origin, masked))
        return replace(merge_overviews(parts), row_edges=row_edges, col_edges=col_edges)

    def tell_of_endings(self, listener: Listener) -> None:
        """Let a view know when ranks end that hold either."""
        for source in (self.a, self.b):
            if isinstance(source, Mortal):
                source.tell_of_endings(listener)

    def labels(self, dim: int, fixed: Mapping[int, int] | None = None) -> Sequence[str] | None:
        """Return B's labels."""
        return self.b.labels(dim, fixed)
