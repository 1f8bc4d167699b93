"""Where everything stands in a picture, in CSS pixels: one geometry for canvas and PNG. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexmagic.view.plane import NO_DIM, extent
from flexmagic.view.source import LINES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexmagic.view.plane import Plane
    from flexmagic.view.source import Info, Span

CHAR = 6.7  # widest usual character of the 11 px label font
LINE = 13
ROW_APART = 12
RIBBON = 15
GAP = 3
AXIS = 20
WIDEST_LABEL = 132
TALLEST_LABEL = 96
CELL_WIDE, CELL_TALL = 40, 22
MAP_TALL, MAP_LOW = 352, 44
NARROWEST = 120
NUMBERS, PLOT_TALL, WIDEST_PLOT = 62, 240, 900


@dataclass(frozen=True)
class Layout:
    """Sizes in CSS pixels: the map at (``left``, ``top``), ribbons and labels around it.

    From the left: row labels, row ribbon, map. From the top: column labels, column ribbon, map,
    axis. ``width`` and ``height`` are of everything.
    """

    left: int
    top: int
    map_width: int
    map_height: int
    row_ribbon: bool
    col_ribbon: bool
    row_label_space: int
    col_label_space: int
    width: int
    height: int


def lay_out(
    info: Info,
    plane: Plane,
    width: int,
    *,
    row_labels: Sequence[str] | None = None,
    col_labels: Sequence[str] | None = None,
    row_ribbon: bool = False,
    col_ribbon: bool = False,
    tall: int = MAP_TALL,
) -> Layout:
    """Fit the plane into ``width``: big cells for small tensors, the map never higher than ``tall``.

    Where there is little room, labels get at most a third of it.
    """
    if info.form == LINES:
        return _lay_out_lines(width, col_ribbon=col_ribbon)
    rows, cols = extent(info, plane)
    highest = tall
    left = min(_label_room(row_labels, rows, plane.rows), max(width // 3, 8))
    row_room = left
    left += (RIBBON + GAP) if row_ribbon else 0
    room = max(width - left - 2, NARROWEST)
    tall = int(min(max(rows * CELL_TALL, MAP_LOW), highest))
    wide = int(min(room, max(cols * CELL_WIDE, NARROWEST)))
    if rows > 1 and cols > 1 and info.dims[plane.rows] == info.dims[plane.cols]:
        # A dim against itself (an attention pattern) is read along its diagonal: square cells.
        wide = int(min(room, max(tall * cols / rows, NARROWEST)))
        tall = int(max(min(tall, wide * rows / cols), MAP_LOW))
    top = 0
    if col_labels is not None and wide / max(cols, 1) >= LINE - 2:
        top = int(min(max(len(text) for text in col_labels) * CHAR + 6, TALLEST_LABEL, highest // 2))
    col_room = top
    top = top or (0 if col_ribbon else LINE // 2)  # or the first row's number would be cut off
    top += (RIBBON + GAP) if col_ribbon else 0
    return Layout(
        left=left,
        top=top,
        map_width=wide,
        map_height=tall,
        row_ribbon=row_ribbon,
        col_ribbon=col_ribbon,
        row_label_space=row_room,
        col_label_space=col_room,
        width=left + wide + 2,
        height=top + tall + AXIS,
    )


def _lay_out_lines(width: int, *, col_ribbon: bool) -> Layout:
    """Fit lines into ``width``: numbers on the left, no labels of rows."""
    top = LINE // 2 + ((RIBBON + GAP) if col_ribbon else 0)
    wide = max(min(width, WIDEST_PLOT) - NUMBERS - LINE, NARROWEST)
    return Layout(
        NUMBERS, top, wide, PLOT_TALL, row_ribbon=False, col_ribbon=col_ribbon, row_label_space=NUMBERS,
        col_label_space=0, width=NUMBERS + wide + LINE, height=top + PLOT_TALL + AXIS,
    )  # fmt: skip


def _label_room(labels: Sequence[str] | None, rows: int, dim: int) -> int:
    """Return the width that row labels or row numbers need."""
    if dim == NO_DIM:
        return 8
    longest = max((len(text) for text in labels), default=0) if labels else len(str(rows))
    number = len(str(rows)) + 1 if labels else 0
    return int(min((longest + number) * CHAR + 10, WIDEST_LABEL))


def ticks(window: Span, room: int, apart: int) -> tuple[int, ...]:
    """Return positions to number along a window: round steps, at least ``apart`` pixels apart."""
    start, stop = window
    most = max(room // apart, 1)
    step = 1
    factors = (2, 2.5, 2)
    turn = 0
    while (stop - start) / step > most:
        step = int(step * factors[turn % 3])
        turn += 1
    first = -(-start // step) * step
    return tuple(range(first, stop, step))
