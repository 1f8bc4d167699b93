"""Two tensors beside each other, A | B | B-A, and two runs site by site. Pure, numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flexmagic.errors import FlexError, InputError
from flexmagic.view.arrays import ArraySource, info_of, numbers_of
from flexmagic.view.differ import change_between, difference, relative, verdict
from flexmagic.view.masks import mask_of, masked_at
from flexmagic.view.sheet import Wanted
from flexmagic.view.source import Source
from flexmagic.view.words import plural, short, visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from flexmagic.view.picture import Look
    from flexmagic.view.source import Change, Index, Info, Overview, Stats

HEAD = ("site", "relative change", "max|\N{GREEK CAPITAL LETTER DELTA}|", "bit-equal", "how equal")


@runtime_checkable
class Sites(Protocol):
    """What has sites to be compared one by one: a run."""

    @property
    def sites(self) -> Sequence[str]:
        """The names of the sites."""
        ...

    def __getitem__(self, site: str) -> Source:
        """Return what was captured at one."""
        ...


class Compared:
    """Two tensors of one shape and their difference, as a :class:`Source` that is drawn as A | B | B-A.

    Statistics and read-outs are those of the difference; of A and B too where one points.
    """

    def __init__(self, a: Source, b: Source) -> None:
        self.a, self.b = a, b

    @cached_property
    def change(self) -> Change:
        """How B differs from A, counted once."""
        return change_between(self.a, self.b)

    @cached_property
    def delta(self) -> Source:
        """B - A."""
        return difference(self.a, self.b)

    @property
    def info(self) -> Info:
        """Facts of the difference, and how equal the two are."""
        a, b = self.a.info, self.b.info
        said = [f"A: {one}" for one in a.warnings] + [f"B: {one}" for one in b.warnings]
        sides = [
            f"{name}: {', '.join(filter(None, (info.run, info.hook, info.dtype)))}"
            for name, info in (("A", a), ("B", b))
        ]
        site = b.site if a.site == b.site else f"{a.site} and {b.site}"
        return replace(
            self.delta.info, site=site, run=f"B - A ({'; '.join(sides)})", hook=self._equal, step=None,
            warnings=(*self.delta.info.warnings, *said),
        )  # fmt: skip

    @cached_property
    def _equal(self) -> str:
        return in_words(self.change)

    @property
    def bytes_moved(self) -> int:
        """Bytes that looking at the three has moved."""
        known = "delta" in vars(self) and self.delta.bytes_moved
        return self.a.bytes_moved + self.b.bytes_moved + int(known or 0)

    def read(self, index: Index) -> NDArray[Any]:
        """Return a slice of B - A."""
        return self.delta.read(index)

    def masked_at(self, index: Index) -> NDArray[np.bool_] | None:
        """Return which elements of B - A are masked: those of either."""
        return masked_at(self.delta, index)

    def stats(self) -> Stats:
        """Return the statistics of B - A."""
        return self.delta.stats()

    def overview(
        self,
        rows: int,
        cols: int,
        fixed: dict[int, int],
        row_edges: NDArray[np.int64],
        col_edges: NDArray[np.int64],
    ) -> Overview:
        """Reduce B - A to bins."""
        return self.delta.overview(rows, cols, fixed, row_edges, col_edges)

    def labels(self, dim: int, fixed: Mapping[int, int] | None = None) -> Sequence[str] | None:
        """Return B's labels."""
        return self.b.labels(dim, fixed)

    def wanted(self, look: Look) -> tuple[Wanted, ...]:
        """Return the three pictures: A and B in the same colours, the difference in its own."""
        own = replace(look, limits=None)
        return (
            Wanted("A", self.a, look, 0),
            Wanted("B", self.b, look, 0),
            Wanted("B - A", self.delta, own, 1),
        )


@dataclass(frozen=True)
class Row:
    """One site of two runs. ``change`` is None, and ``why`` says so, where values cannot be compared."""

    site: str
    change: Change | None = None
    why: str = ""

    @property
    def relative(self) -> float:
        """The relative change; infinite where there is none to tell."""
        return math.inf if self.change is None else relative(self.change)

    @property
    def texts(self) -> tuple[str, ...]:
        """The row as texts under :data:`HEAD`."""
        if self.change is None:
            return (visible(self.site), "", "", "", visible(self.why, 400))
        c = self.change
        same = f"{c.same / c.n:.1%}" if 0 < c.n != c.same else "all"
        if 0 < c.same < c.n and same in ("0.0%", "100.0%"):
            same = f"{c.same:,} of {c.n:,}"
        equal = verdict(c) + (f" ({self.why})" if self.why else "")
        return (visible(self.site), short(self.relative), short(c.largest), same, equal)


@dataclass
class Comparison:
    """Two runs (or two tensors) compared: ``rows``, the most changed first, what cannot be compared on top.

    ``comparison[site]`` is that site as A | B | B-A.
    """

    rows: tuple[Row, ...]
    open_one: Callable[[str], Compared] = field(repr=False)
    title: str = ""

    def __getitem__(self, site: str) -> Compared:
        """Return one site's comparison; raises :class:`InputError` for one that is not there or cannot be."""
        row = next((row for row in self.rows if row.site == site), None)
        if row is None or row.change is None:
            why = row.why if row is not None else f"Sites: {', '.join(r.site for r in self.rows) or 'none'}"
            raise InputError(f"{site} cannot be compared. {why}")
        return self.open_one(site)

    def __iter__(self) -> Iterator[Row]:
        """The rows."""
        return iter(self.rows)

    @property
    def openers(self) -> dict[str, Callable[[], Source]]:
        """What can be looked at, by site, the most changed first."""
        return {row.site: partial(self.open_one, row.site) for row in self.rows if row.change is not None}

    def __str__(self) -> str:
        """The table as text."""
        cells = [HEAD, *(row.texts for row in self.rows)]
        widths = [max(len(line[c]) for line in cells) for c in range(len(HEAD))]
        lines = ["  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join(([visible(self.title, 400)] if self.title else []) + lines)

    def _ipython_display_(self) -> None:
        from flexmagic.view.display import show_comparison

        show_comparison(self)


def compare(a: Any, b: Any) -> Comparison:
    """Compare B with A: two runs, two activations or two arrays.

    Of two runs every site is listed: those that only one has, and those whose shapes or dtypes do not
    match, with the reason. Captures of the same layout are compared where they are; nothing but
    counts travels. Raises :class:`InputError` for anything else.
    """
    if isinstance(a, Sites) and isinstance(b, Sites) and not isinstance(a, Source):
        return _compare_runs(a, b)
    x, y = _source(a), _source(b)
    return Comparison((_row(y.info.site, lambda: x, lambda: y),), lambda _site: Compared(x, y))


def _source(value: Any) -> Source:
    if isinstance(value, Source):
        return value
    array = numbers_of(value)
    return ArraySource(array, info_of(array), masked=mask_of(value))


def _compare_runs(a: Sites, b: Sites) -> Comparison:
    names = list(dict.fromkeys([*a.sites, *b.sites]))
    rows = []
    for name in names:
        if name not in a.sites or name not in b.sites:
            rows.append(Row(name, why=f"only in {'B' if name in b.sites else 'A'}"))
        else:
            rows.append(_row(name, partial(a.__getitem__, name), partial(b.__getitem__, name)))
    # What cannot be compared stands on top, then by change; equal ones keep the order of the model.
    ordered = sorted(rows, key=lambda row: (row.change is not None, -row.relative))
    title = f"B = {b!r} against A = {a!r}: {plural(len(rows), 'site')}"
    return Comparison(tuple(ordered), lambda site: Compared(a[site], b[site]), title)


def _row(name: str, open_a: Callable[[], Source], open_b: Callable[[], Source]) -> Row:
    try:
        a, b = open_a(), open_b()
        one, other = a.info, b.info
        if one.shape != other.shape:
            return Row(name, why=f"shapes differ: {list(one.shape)} and {list(other.shape)}")
        change = change_between(a, b)
    except FlexError as error:
        return Row(name, why=str(error))
    if one.dtype != other.dtype:
        change = replace(change, same=0)
        return Row(name, change, f"dtypes differ: {one.dtype} and {other.dtype}")
    return Row(name, change)


def in_words(change: Change) -> str:
    """Return a change as one line: relative change, largest difference and how equal."""
    if change.same == change.n:
        return "A and B are bit-equal"
    delta = "\N{GREEK CAPITAL LETTER DELTA}"
    return (
        f"relative change {short(relative(change))}, max|{delta}| {short(change.largest)}; {verdict(change)}"
    )
