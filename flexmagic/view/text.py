"""The text form: what a terminal shows, and ``text/plain`` in a saved notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.view import header
from flexmagic.view.masks import masked_at
from flexmagic.view.pieces import present
from flexmagic.view.plane import Plane, default_plane, extent
from flexmagic.view.table import disagreements
from flexmagic.view.words import number, short, token, visible

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic.view.source import Info, Source, Stats

ROWS, COLS = 5, 6
_LABEL = 14
HOLE_TEXT = "(missing)"
MASKED_TEXT = "--"


def to_text(source: Source) -> str:
    """Return header, statistics and a few values. Moves at most 30 values and the statistics."""
    shown = body(source)
    return "\n".join([heading(source), shown])


def heading(source: Source) -> str:
    """Return the header as text: no data is asked for."""
    info = source.info
    lines = [header.title(info), "  " + " | ".join(header.facts(info, source.bytes_moved))]
    lines += [f"  {text}" for text in header.ownership(info)]
    lines += [f"  warning: {text}" for text in header.warnings(info)]
    return "\n".join(lines)


def body(source: Source, stats: Stats | None = None) -> str:
    """Return the statistics and the first and last values of the default plane as text.

    ``stats`` saves asking for them where they are known.
    """
    info = source.info
    if 0 in info.shape:
        return "  This tensor is empty: there is nothing to show."
    stats = stats or source.stats()
    pairs = header.stats_pairs(stats)
    numbers = "  " + "  ".join(f"{name} {text}" for name, text in pairs)
    plane = default_plane(info)
    cells = _table(source, info, plane)
    widths = [max(len(row[c]) for row in cells) for c in range(len(cells[0]))]
    lines = [
        "  " + "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in cells
    ]
    at = ", ".join(f"{visible(info.dims[d], 40)} {i}" for d, i in sorted(plane.fixed.items()))
    warnings = [f"  warning: {text}" for text in (*header.odd_values(stats), *disagreements(source))]
    return "\n".join([numbers, *warnings, *([f"  at {at}:"] if at else []), *lines])


def _table(source: Source, info: Info, plane: Plane) -> list[list[str]]:
    """Return the cells of the small table, with positions and labels; skipped ones are an ellipsis."""
    rows, cols = (_ends(n, most) for n, most in zip(extent(info, plane), (ROWS, COLS), strict=True))
    labels = source.labels(plane.rows, plane.fixed) if plane.rows >= 0 else None
    blocks = [[_read(source, info, plane, r, c) for c in cols] for r in rows]
    table: list[list[str]] = []
    if plane.cols >= 0:
        name = visible(info.dims[plane.cols], 40)
        head = [[str(i) for i in range(*c)] for c in cols]
        down = visible(info.dims[plane.rows], 40) if plane.rows >= 0 else ""
        corner = f"{down} \\ {name}" if down else name
        table.append([corner, *_join(head)])
    for block, (start, stop) in zip(blocks, rows, strict=True):
        if table and len(rows) > 1 and start:
            table.append(["\N{HORIZONTAL ELLIPSIS}"] * len(table[-1]))
        for i in range(stop - start):
            label = f" {token(labels[start + i], _LABEL)}" if labels else ""
            first = f"{start + i}{label}" if plane.rows >= 0 else ""
            table.append([first, *_join([part[i] for part in block])])
    return table


def _ends(size: int, most: int) -> list[tuple[int, int]]:
    """Return all of a dim, or its two ends with ``most`` positions together."""
    if size <= most:
        return [(0, size)]
    return [(0, most - most // 2), (size - most // 2, size)]


def _join(parts: list[list[str]]) -> list[str]:
    return parts[0] if len(parts) == 1 else [*parts[0], "\N{HORIZONTAL ELLIPSIS}", *parts[1]]


def _read(
    source: Source, info: Info, plane: Plane, rows: tuple[int, int], cols: tuple[int, int]
) -> list[list[str]]:
    """Return a corner of the plane as texts, rows x columns."""
    spans = {plane.rows: slice(*rows), plane.cols: slice(*cols)}
    index = tuple(spans.get(d, plane.fixed.get(d, 0)) for d in range(len(info.shape)))
    tile: NDArray[Any] = source.read(index)
    texts = np.array([_brief(value, info.dtype) for value in tile.reshape(-1)], dtype=object)
    for mask, text, where in (
        (present(info, index), HOLE_TEXT, False),
        (masked_at(source, index), MASKED_TEXT, True),
    ):
        if mask is not None:
            texts[mask.reshape(-1) == where] = text
    square = texts.reshape(tile.shape)
    square = square.T if plane.rows > plane.cols else square
    out: list[list[str]] = square.reshape(rows[1] - rows[0], cols[1] - cols[0]).tolist()
    return out


def _brief(value: Any, dtype: str) -> str:
    """Return a value for the table: exact where it is no float, four digits where it is."""
    if isinstance(value, np.floating) and np.isfinite(value):
        return short(float(value))
    return number(value, dtype)
