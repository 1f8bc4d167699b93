"""Lines over a dim: what a plot of a metric consists of beside its layout. Pure, numpy alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flexmagic.view.words import plural, short, visible

if TYPE_CHECKING:
    from flexmagic.view.picture import Picture

INKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8f6400", "#6a5acd", "#7f7f7f")
"""Colours of lines on light and dark paper alike, after Okabe and Ito; then the same again, dashed."""
_MARGIN = 0.05
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Curves:
    """One list of values per row, ``None`` where a value is not finite or missing; and the axis for them.

    ``low`` and ``high`` are the ends of the axis, ``ticks`` its numbers, ``names`` those of the rows.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    values: tuple[tuple[float | None, ...], ...]
    names: tuple[str, ...]


def curves_of(picture: Picture) -> Curves:
    """Return the lines of a picture, with an axis that leaves a little room at both ends."""
    finite = picture.values[np.isfinite(picture.values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    room = (high - low) * _MARGIN or max(abs(low) * _MARGIN, 1e-12)
    low, high = low - room, high + room
    first, last = picture.grid.rows
    names = picture.row_labels[first:last] if picture.row_labels else tuple(map(str, range(first, last)))
    return Curves(
        low=low,
        high=high,
        ticks=tuple((at, f"{at:.6g}") for at in round_ticks(low, high)),
        values=tuple(
            tuple(float(v) if math.isfinite(v) else None for v in row) for row in picture.values.tolist()
        ),
        names=names if picture.plane.rows >= 0 else (),
    )


def round_ticks(low: float, high: float, most: int = 6) -> tuple[float, ...]:
    """Return at most ``most`` round numbers between two ends."""
    wide = (high - low) / most
    if not (math.isfinite(wide) and wide > 0):
        return ()
    power = 10.0 ** math.floor(math.log10(wide))
    step = next((s * power for s in _STEPS if s * power >= wide), 10 * power)
    first, last = math.ceil(low / step), math.floor(high / step)
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def line_caption(picture: Picture) -> str:
    """Return what is said under lines: how many, the extremes, and what is not finite."""
    rows, cols = picture.grid.shape
    finite = picture.values[np.isfinite(picture.values)]
    ends = (
        f"from {short(float(finite.min()))} to {short(float(finite.max()))}" if finite.size else "none finite"
    )
    name = visible(picture.info.dims[picture.plane.cols], 40)
    counts = picture.counts
    odd = f"NaN {counts.nan_values:,}, +Inf {counts.posinf_values:,}, -Inf {counts.neginf_values:,}"
    odd += f", masked {counts.masked_values:,}" if counts.masked_values else ""
    return f"{plural(rows, 'line')} over {name}, {plural(cols, 'point')} each; values {ends}; {odd}."
