"""Statistics by rank and of the whole, with histograms on bins that all share. Pure, numpy alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from flexmagic.view.differ import change_between, tiles
from flexmagic.view.masks import seen
from flexmagic.view.pieces import copies
from flexmagic.view.reduce import bin_edges, compute_stats, count_between, merge_stats
from flexmagic.view.source import ByRank
from flexmagic.view.words import ranks, short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from flexmagic.view.source import Info, Source, Stats

BINS = 40
REACH = 6.0
"""Standard deviations from the mean beyond which a value is counted outside all bins."""
HEAD = ("", "n", "min", "max", "mean", "std", "zeros", "NaN", "+Inf", "-Inf", "outside bins")
_BARS = " \N{LOWER ONE EIGHTH BLOCK}\N{LOWER ONE QUARTER BLOCK}\N{LOWER THREE EIGHTHS BLOCK}"
_BARS += "\N{LOWER HALF BLOCK}\N{LOWER FIVE EIGHTHS BLOCK}\N{LOWER THREE QUARTERS BLOCK}"
_BARS += "\N{LOWER SEVEN EIGHTHS BLOCK}\N{FULL BLOCK}"


@dataclass(frozen=True)
class Row:
    """The whole or one rank's own: statistics, and counts (int64) per bin."""

    name: str
    stats: Stats
    counts: NDArray[np.int64]

    @property
    def outside(self) -> int:
        """How many finite values lie beyond the bins."""
        s = self.stats
        return s.n - s.nan - s.posinf - s.neginf - int(self.counts.sum())


@dataclass(frozen=True, repr=False)
class RankTable:
    """Rows, the whole first, and the ``edges`` of the bins that their histograms share.

    ``notes`` say how replicas agree, one sentence per set of them.
    """

    edges: NDArray[np.float64]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Aligned columns; histograms as blocks, each row to its own highest bin."""
        cells = [(*HEAD, "histogram"), *((*texts(row), bars(row.counts)) for row in self.rows)]
        widths = [max(len(line[c]) for line in cells) for c in range(len(cells[0]))]
        lines = [
            "  ".join(
                text.ljust(w) if c in (0, len(HEAD)) else text.rjust(w)
                for c, (text, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        return "\n".join([*lines, *binned(self.edges), *self.notes])

    def __repr__(self) -> str:
        """As :meth:`__str__`: what a notebook and a terminal show."""
        return str(self)


def rank_table(source: Source) -> RankTable:
    """Return the table of a tensor: a few numbers per rank travel, of a sum the whole does.

    The whole's row is merged from one rank of each set of replicas. Raises what the source raises.
    """
    info = source.info
    if not isinstance(source, ByRank) or not info.pieces:
        values = [seen(source, index) for index in tiles(info.shape)]
        stats = merge_stats([compute_stats(part) for part in values])
        edges = edges_for([stats])
        counts = np.sum([count_between(part, edges) for part in values], axis=0)
        return RankTable(edges, (Row("whole", stats, counts),))
    first = {share.rank: share.stats for share in source.shares(np.zeros(1))}
    chosen = [next(r for r in group if r in first) for group in copies(info) if first.keys() & set(group)]
    summed = seen(source, (slice(None),) * len(info.shape)) if info.partial else None
    whole = merge_stats([first[rank] for rank in chosen]) if summed is None else compute_stats(summed)
    edges = edges_for([whole, *first.values()])
    shares = {share.rank: share for share in source.shares(edges)}
    if summed is not None:
        counts = count_between(summed, edges)
    else:
        counts = np.sum([shares[rank].counts for rank in chosen], axis=0) if chosen else np.zeros(0, np.int64)
    what = "summand of rank" if info.partial else "rank"
    return RankTable(
        edges,
        (
            Row("whole", whole, counts),
            *(Row(f"{what} {rank}", share.stats, share.counts) for rank, share in shares.items()),
        ),
        (*lost(info), *agreement(source)),
    )


def edges_for(each: Sequence[Stats]) -> NDArray[np.float64]:
    """Return bins for all rows: over everything, but not further out than six standard deviations."""
    some = [s for s in each if s.n > s.nan + s.posinf + s.neginf]
    low = min((max(s.min, s.mean - REACH * s.std) for s in some), default=np.nan)
    high = max((min(s.max, s.mean + REACH * s.std) for s in some), default=np.nan)
    return bin_edges(low, high, BINS)


def lost(info: Info) -> tuple[str, ...]:
    """Return a sentence on the ranks that are not in the table."""
    return (f"{ranks(info.missing_ranks)} cannot answer and is in no row.",) if info.missing_ranks else ()


def agreement(source: Source) -> tuple[str, ...]:
    """Return how replicas agree, one sentence per set of them; nothing where there are none.

    Only digests travel, unless replicas differ: then those that do are read once.
    """
    info = source.info
    groups = [[r for r in group if r not in info.missing_ranks] for group in copies(info)]
    if not isinstance(source, ByRank) or not any(len(group) > 1 for group in groups):
        return ()
    digests = source.digests()
    found = []
    for group in groups:
        if len(group) < 2:
            continue
        alike: dict[str, list[int]] = {}
        for rank in group:
            alike.setdefault(digests[rank], []).append(rank)
        name = f"{len(group)} replicas on {ranks(group)}"
        if len(alike) == 1:
            found.append(f"{name}: bit-equal.")
            continue
        pairs = [_apart(source, a[0], b[0]) for a, b in combinations(alike.values(), 2)]
        far, who, odd = max(pairs, key=lambda pair: (pair[2] > 0, np.nan_to_num(pair[0], nan=-1.0)))
        not_finite = f", and {odd:,} values are not finite in only one of them" if odd else ""
        far_text = "only in bits" if far == 0 else f"by up to {short(far)}"
        found.append(
            f"{name} differ: {ranks(who)} {far_text}{not_finite}. The whole shows {ranks(group[:1])}."
        )
    return tuple(found)


def disagreements(source: Source) -> tuple[str, ...]:
    """Return only those sentences of :func:`agreement` that are a warning."""
    return tuple(text for text in agreement(source) if " differ: " in text)


def _apart(source: ByRank, a: int, b: int) -> tuple[float, tuple[int, int], int]:
    change = change_between(source.held(a), source.held(b))
    return change.largest, (a, b), change.odd


def texts(row: Row) -> tuple[str, ...]:
    """Return a row as texts, one per column of :data:`HEAD`."""
    s = row.stats
    share = f"{s.zeros:,}" + (f" ({s.zeros / s.n:.1%})" if s.n else "")
    return (
        row.name, f"{s.n:,}", short(s.min), short(s.max), short(s.mean), short(s.std), share,
        f"{s.nan:,}", f"{s.posinf:,}", f"{s.neginf:,}", f"{row.outside:,}",
    )  # fmt: skip


def bars(counts: NDArray[np.int64] | Sequence[int]) -> str:
    """Return a histogram as blocks; what is not zero is never blank."""
    most = max((int(c) for c in counts), default=0)
    steps = len(_BARS) - 1
    return "".join(_BARS[-(-int(c) * steps // most) if most else 0] for c in counts)


def binned(edges: NDArray[np.float64]) -> tuple[str, ...]:
    """Return the sentence that says what the bins are."""
    if len(edges) < 2:
        return ()
    low, high = short(float(edges[0])), short(float(edges[-1]))
    return (f"Histograms: {len(edges) - 1} equal bins from {low} to {high}, the same for all rows.",)
