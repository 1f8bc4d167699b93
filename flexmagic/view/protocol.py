"""Messages between the live widget and its canvas, as plain data. Pure, numpy alone.

The browser asks, Python answers; each question has the name of its view and a number, which the
answer repeats, so that several views share one widget and late answers are told apart.

* ``look``: fields of :class:`Look`, ``layer``, ``step``, ``part``; answered by ``picture`` with two buffers
  for each pane: one byte per cell, and the colours of the 256 codes as RGBA.
* ``probe``: ``picture`` (the number of its look), ``pane``, ``row``, ``col``; answered by ``probe``.
* ``check``: ``layer`` and ``step``; answered by ``check``, warnings of replicas that differ.
* ``table``: ``layer``, ``step`` and ``part``; answered by ``table``, statistics and histograms by rank.
* Any of them may be answered by ``error`` with a sentence.

One message comes unasked, to all views: ``ended`` with ``ranks`` whose engines have just ended.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flexmagic.view import header, ribbon
from flexmagic.view.caption import bar, probe, sheet_caption
from flexmagic.view.layout import ROW_APART, ticks
from flexmagic.view.lines import INKS, curves_of
from flexmagic.view.picture import ALONE, LAYERS, REDUCERS, STEPS, Look
from flexmagic.view.pieces import copies
from flexmagic.view.plane import extent
from flexmagic.view.scale import SCALES, palette
from flexmagic.view.source import LINES, STRIP, ByRank
from flexmagic.view.table import HEAD, binned, texts
from flexmagic.view.words import token, visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flexmagic.view.picture import Picture
    from flexmagic.view.ribbon import Segment
    from flexmagic.view.sheet import Pane, Sheet
    from flexmagic.view.source import Info, Source, Span, Stats
    from flexmagic.view.table import RankTable

NARROWEST, WIDEST = 240, 2400
_PAIR = 2
FEW_RANKS, MOST_PARTS = 2, 128
WHOLE = -1
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
        facet=_whole(message.get("facet")),
        first=_whole(message.get("first")) or 0,
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
        "facts": list(header.facts(info, source.bytes_moved)),
        "warnings": [*header.warnings(info), *header.odd_values(stats)],
        "owners": list(header.ownership(info)),
        "stats": [list(pair) for pair in header.stats_pairs(stats)] if stats else [],
        "dims": [
            {"name": visible(name, 40), "size": n} for name, n in zip(info.dims, info.shape, strict=True)
        ],
        "replicas": isinstance(source, ByRank) and any(len(group) > 1 for group in copies(info)),
        "reducers": list(REDUCERS),
        "scales": list(SCALES),
    }


def parts(source: Source) -> list[list[Any]]:
    """Return what can be looked at of a tensor: the whole, and what each rank holds where it is not that."""
    info = source.info
    holders = sorted({piece.rank for piece in info.pieces} - set(info.missing_ranks))
    if not isinstance(source, ByRank) or len(holders) < FEW_RANKS:
        return [[WHOLE, "whole"]]
    what = "summand of rank" if info.partial else "own part of rank"
    return [[WHOLE, "whole"], *([rank, f"{what} {rank}"] for rank in holders[:MOST_PARTS])]


def table(found: RankTable) -> Message:
    """Return the table by rank as the browser shows it."""
    return {
        "head": list(HEAD),
        "rows": [[list(texts(row)), row.counts.tolist()] for row in found.rows],
        "notes": [*binned(found.edges), *found.notes],
    }


def nothing_to_draw(info: Info) -> Message:
    """Return what is said in place of a picture of a tensor without elements."""
    none = " and ".join(visible(name, 40) for name, n in zip(info.dims, info.shape, strict=True) if n == 0)
    return {"empty": f"This tensor is empty ({none} has size 0): there is nothing to draw."}


def describe(sheet: Sheet, layers: int = 1, steps: int = 1) -> Message:
    """Return everything the canvases draw and say, except the buffers."""
    info, plane = sheet.lead.info, sheet.lead.plane
    free = [d for d in plane.fixed if info.shape[d] > 1]
    facets = [[ALONE, "one picture"], *([d, visible(info.dims[d], 40)] for d in free)]
    for along, name, count in ((LAYERS, "layer", layers), (STEPS, "step", steps)):
        if count > 1:
            facets.append([along, name])
    if sheet.facet == ALONE and len(sheet.panes) > 1:
        facets = []  # it is several pictures by nature, and there is nothing to choose
    return {
        "rows": plane.rows,
        "cols": plane.cols,
        "fixed": {str(d): at for d, at in plane.fixed.items()},
        "exact": all(pane.picture.grid.exact for pane in sheet.panes),
        "reducer": sheet.lead.reducer,
        "scale": sheet.lead.scale.mode,
        "limits": [sheet.lead.scale.low, sheet.lead.scale.high],
        "caption": list(sheet_caption(sheet)),
        "facet": sheet.facet,
        "facets": facets,
        "first": sheet.first,
        "count": sheet.count,
        "ranks": _ranks(sheet),
        "panes": [_describe_pane(pane) for pane in sheet.panes],
    }


def _ranks(sheet: Sheet) -> list[int] | None:
    """Return the ranks whose end would change what is shown; None where that is not known."""
    infos = [pane.picture.info for pane in sheet.panes]
    if not all(info.pieces for info in infos):
        return None
    return sorted(
        {piece.rank for info in infos for piece in info.pieces if piece.rank not in info.missing_ranks}
    )


def buffers(sheet: Sheet) -> list[bytes]:
    """Return codes and colours of each pane in turn."""
    return [
        part
        for pane in sheet.panes
        for part in (pane.picture.codes.tobytes(), palette(pane.picture.scale.kind).tobytes())
    ]


def _describe_pane(pane: Pane) -> Message:
    picture = pane.picture
    info, plane, grid, layout = picture.info, picture.plane, picture.grid, picture.layout
    return {
        "title": pane.title,
        "form": info.form,
        "extent": list(extent(info, plane)),
        "window": {"rows": list(grid.rows), "cols": list(grid.cols)},
        "cells": list(grid.shape),
        "bar": [list(pair) for pair in bar(picture)],
        "layout": vars(layout),
        "ribbons": {
            "rows": _segments(picture.row_ribbon, grid.rows),
            "cols": _segments(picture.col_ribbon, grid.cols),
        },
        "holes": [{"rows": h.rows, "cols": h.cols, "text": h.text} for h in picture.holes],
        "peaks": [[peak.row, peak.col] for peak in picture.peaks],
        "texts": None if picture.texts is None else [[token(t, 12) for t in row] for row in picture.texts],
        "labels": {
            "rows": _visible_part(picture.row_labels, grid.rows, layout.map_height),
            "cols": _visible_part(
                picture.col_labels, grid.cols, grid.shape[1] if info.form == STRIP else layout.map_width
            ),
        },
        "ticks": {
            "rows": ticks(grid.rows, layout.map_height, ROW_APART) if plane.rows >= 0 else (),
            "cols": ticks(grid.cols, layout.map_width, 56) if plane.cols >= 0 else (),
        },
        "curves": _curves(picture) if info.form == LINES else None,
        "number": probe(pane.source, picture, 0, 0) if not info.shape else None,
    }


def _curves(picture: Picture) -> Message:
    found = curves_of(picture)
    return vars(found) | {"inks": INKS}


def _segments(segments: Sequence[Segment], window: Span) -> list[Message]:
    """Return the stretches that reach into the window."""
    return [
        {
            "start": s.start,
            "stop": s.stop,
            "text": s.text,
            "short": s.short,
            "hatched": s.hatched,
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
