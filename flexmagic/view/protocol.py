"""Messages between the live widget and its canvas, as plain data. Pure, numpy alone.

The browser asks, Python answers; each question has the name of its view and a number, which the
answer repeats, so that several views share one widget and late answers are told apart.

* ``look``: fields of :class:`Look` and ``layer``; answered by ``picture`` with two buffers: one
  byte per cell, and the colours of the 256 codes as RGBA.
* ``probe``: ``picture`` (the number of its look), ``row``, ``col``; answered by ``probe``.
* Either may be answered by ``error`` with a sentence.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flexmagic.view import header, ribbon
from flexmagic.view.caption import bar, caption, probe
from flexmagic.view.layout import LINE, ticks
from flexmagic.view.picture import REDUCERS, Look
from flexmagic.view.plane import extent
from flexmagic.view.scale import SCALES
from flexmagic.view.words import size, visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flexmagic.view.picture import Picture
    from flexmagic.view.ribbon import Segment
    from flexmagic.view.source import Info, Source, Span, Stats

NARROWEST, WIDEST = 240, 2400
_PAIR = 2
Message = dict[str, Any]


def read_look(message: Mapping[str, Any]) -> Look:
    """Return the :class:`Look` a browser asks for; what makes no sense takes its default."""
    fixed = message.get("fixed")
    pairs = fixed.items() if isinstance(fixed, dict) else ()
    width = _whole(message.get("width"))
    limits = _pair(message.get("limits"))
    scale = message.get("scale")
    return Look(
        rows=_whole(message.get("rows")),
        cols=_whole(message.get("cols")),
        fixed={int(d): at for d, i in pairs if str(d).isdecimal() and (at := _whole(i)) is not None},
        row_window=_window(message.get("row_window")),
        col_window=_window(message.get("col_window")),
        reducer=str(message.get("reducer", REDUCERS[0])),
        scale=scale if scale in SCALES else SCALES[0],
        limits=limits if limits and limits[0] < limits[1] else None,
        width=min(max(width or 0, NARROWEST), WIDEST),
    )


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if known and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _pair(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, (list, tuple)) or len(value) != _PAIR:
        return None
    low, high = _number(value[0]), _number(value[1])
    return None if low is None or high is None else (low, high)


def _window(value: Any) -> tuple[int, int] | None:
    """Return whole positions that cover the window."""
    pair = _pair(value)
    return None if pair is None else (math.floor(pair[0]), math.ceil(pair[1]))


def about(info: Info, source: Source, stats: Stats | None) -> Message:
    """Return what stands around the picture: header, warnings, owners, statistics."""
    return {
        "title": header.title(info),
        "facts": list(header.facts(info)),
        "warnings": list(header.warnings(info)),
        "owners": list(header.ownership(info)),
        "stats": [list(pair) for pair in header.stats_pairs(stats)] if stats else [],
        "moved": size(source.bytes_moved),
        "dims": [
            {"name": visible(name, 40), "size": n} for name, n in zip(info.dims, info.shape, strict=True)
        ],
        "reducers": list(REDUCERS),
        "scales": list(SCALES),
    }


def nothing_to_draw(info: Info) -> Message:
    """Return what is said in place of a picture of a tensor without elements."""
    none = " and ".join(visible(name, 40) for name, n in zip(info.dims, info.shape, strict=True) if n == 0)
    return {"empty": f"This tensor is empty ({none} has size 0): there is nothing to draw."}


def describe(source: Source, picture: Picture) -> Message:
    """Return everything the canvas draws and says, except the two buffers."""
    info, plane, grid, layout = picture.info, picture.plane, picture.grid, picture.layout
    return {
        "rows": plane.rows,
        "cols": plane.cols,
        "fixed": {str(d): at for d, at in plane.fixed.items()},
        "extent": list(extent(info, plane)),
        "window": {"rows": list(grid.rows), "cols": list(grid.cols)},
        "cells": list(grid.shape),
        "exact": grid.exact,
        "reducer": picture.reducer,
        "scale": picture.scale.mode,
        "limits": [picture.scale.low, picture.scale.high],
        "bar": [list(pair) for pair in bar(picture)],
        "caption": list(caption(picture)),
        "layout": vars(layout),
        "ribbons": {
            "rows": _segments(picture.row_ribbon, grid.rows),
            "cols": _segments(picture.col_ribbon, grid.cols),
        },
        "holes": [{"rows": h.rows, "cols": h.cols, "text": h.text} for h in picture.holes],
        "labels": {
            "rows": _visible_part(picture.row_labels, grid.rows, layout.map_height),
            "cols": _visible_part(picture.col_labels, grid.cols, layout.map_width),
        },
        "ticks": {
            "rows": ticks(grid.rows, layout.map_height, LINE) if plane.rows >= 0 else (),
            "cols": ticks(grid.cols, layout.map_width, 56) if plane.cols >= 0 else (),
        },
        "number": probe(source, picture, 0, 0) if not info.shape else None,
    }


def _segments(segments: Sequence[Segment], window: Span) -> list[Message]:
    """Return the stretches that reach into the window."""
    return [
        {
            "start": s.start,
            "stop": s.stop,
            "text": s.text,
            "short": ",".join(str(rank) for rank in s.ranks),
            "fill": _css(ribbon.fill(s.color)),
            "ink": _css(ribbon.ink(s.color)),
            "missing": s.missing,
        }
        for s in segments
        if s.start < window[1] and window[0] < s.stop
    ]


def _css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _visible_part(labels: Sequence[str] | None, window: tuple[int, int], room: int) -> list[str] | None:
    """Return the labels of a window if some of them have room to be read."""
    if labels is None or (window[1] - window[0]) > room:
        return None
    return list(labels[window[0] : window[1]])
