"""What is said under a picture and about one of its cells. Pure.

The caption always says the reducer, the limits, and how many cells are clipped, not finite or
missing: also when it is none, because silence could mean either.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.view import scale as colors
from flexmagic.view.lines import line_caption
from flexmagic.view.picture import LAYERS, OUTLIER, REDUCER_TEXT, STEPS
from flexmagic.view.pieces import owners
from flexmagic.view.reduce import MOST_PEAKS
from flexmagic.view.source import LINES
from flexmagic.view.words import number, plural, ranks, short, span, visible

if TYPE_CHECKING:
    from flexmagic.view.picture import Picture
    from flexmagic.view.plane import Plane
    from flexmagic.view.sheet import Pane, Sheet
    from flexmagic.view.source import Peak, Source


LAST_EXACT = 2.0**53
"""From here on a whole number may not be exact in double precision, in which outliers are found."""


def where(picture: Picture) -> str:
    """Return which part of the tensor is drawn: rows, columns, and the index in all other dims."""
    info, plane = picture.info, picture.plane
    texts = []
    for word, dim, at in (
        ("rows", plane.rows, picture.grid.rows),
        ("columns", plane.cols, picture.grid.cols),
    ):
        if dim >= 0:
            whole = "" if at == (0, info.shape[dim]) else f" of {info.shape[dim]:,}"
            texts.append(f"{word} {visible(info.dims[dim], 40)}[{at[0]}:{at[1]}]{whole}")
    texts += [f"{visible(info.dims[d], 40)}[{at}]" for d, at in sorted(plane.fixed.items())]
    return ", ".join(texts)


def method(picture: Picture, *others: Picture) -> str:
    """Return how values of pictures became cells: 1:1, or the named reducer with what a cell covers."""
    each = (picture, *others)
    what = "magnitudes of complex values, " if picture.info.dtype.startswith("complex") else ""
    reduced = [one for one in each if one.overview is not None]
    if not reduced:
        return f"{what}1:1, every value drawn"
    widths = [
        np.concatenate([np.diff(getattr(one.grid, edges)) for one in each])
        for edges in ("row_edges", "col_edges")
    ]
    even = "" if all(w.min() == w.max() for w in widths) else "up to "
    box = " x ".join(f"{w.max():,}" for w in widths)
    return f"{what}overview: each cell is the {REDUCER_TEXT[reduced[0].reducer]} of {even}{box} values"


def tally(picture: Picture) -> str:
    """Return clipped, non-finite and missing cells: always all of them, none included."""
    counts = picture.counts
    drawn = plural(counts.cells, "cell") + (
        "" if picture.overview is None else f" of {plural(counts.values, 'value')}"
    )
    odd = [
        f"{name} {_both(cells, values, exact=picture.overview is None)}"
        for name, cells, values in (
            ("NaN", counts.nan, counts.nan_values),
            ("+Inf", counts.posinf, counts.posinf_values),
            ("-Inf", counts.neginf, counts.neginf_values),
        )
    ]
    if counts.masked_values:
        odd.append(f"masked {_both(counts.masked, counts.masked_values, exact=picture.overview is None)}")
    missing = f"missing {counts.hole:,}" if picture.info.missing_ranks else ""
    clipped = f"clipped: {counts.above:,} above, {counts.below:,} below"
    return "; ".join(text for text in (drawn, clipped, ", ".join(odd), missing) if text)


def _both(cells: int, values: int, *, exact: bool) -> str:
    return f"{cells:,}" if exact or not values else f"{values:,} in {plural(cells, 'cell')}"


def ringed(picture: Picture) -> str:
    """Return how many outliers an overview marks, and where the largest is; nothing where there is none."""
    if not picture.peaks:
        return ""
    info, plane, most = picture.info, picture.plane, picture.peaks[0]
    at = {plane.rows: most.row, plane.cols: most.col}
    place = ", ".join(f"{visible(info.dims[d], 40)} {i}" for d, i in at.items() if d >= 0)
    many = plural(len(picture.peaks), "value")
    beyond = f"beyond {OUTLIER:g} times the root mean square of all"
    if len(picture.peaks) == MOST_PEAKS:
        many, beyond = f"the {MOST_PEAKS} largest values", f"{beyond} (there may be more)"
    return f"Ringed: {many} {beyond}; the largest is {short(most.value)} at {place}."


def caption(picture: Picture) -> tuple[str, ...]:
    """Return the lines under the picture."""
    if picture.info.form == LINES:
        how = "" if picture.overview is None else f"An {method(picture)}."
        return tuple(text for text in (line_caption(picture), how) if text)
    how = method(picture)
    place = where(picture)
    lines = (
        f"{place}{'. ' if place else ''}{how[0].upper()}{how[1:]}.",
        f"Colours {picture.scale.text}; {tally(picture)}.",
        ringed(picture),
    )
    return tuple(line for line in lines if line)


def sheet_caption(sheet: Sheet) -> tuple[str, ...]:
    """Return the lines under several pictures: what they have in common once, counts added up."""
    if len(sheet.panes) == 1:
        return caption(sheet.lead)
    lead, how = sheet.lead, method(*(pane.picture for pane in sheet.panes))
    shapes = {pane.picture.info.shape for pane in sheet.panes}
    along = {LAYERS: "the layers", STEPS: "the steps"}.get(sheet.facet, "")
    if sheet.facet >= 0:
        along = visible(lead.info.dims[sheet.facet], 40)
        plane = replace(lead.plane, fixed={d: at for d, at in lead.plane.fixed.items() if d != sheet.facet})
        lead = replace(lead, plane=plane)
    last = sheet.first + len(sheet.panes)
    some = "all" if len(sheet.panes) == sheet.count else f"[{sheet.first}:{last}] of"
    side = f"Side by side along {along}: {some} {sheet.count}. " if along else ""
    place = where(lead) if len(shapes) == 1 else "pictures of different size"
    lines = [f"{side}{place[:1].upper()}{place[1:]}{'. ' if place else ''}{how[0].upper()}{how[1:]}."]
    by_scale: dict[Any, list[Pane]] = {}
    for pane in sheet.panes:
        by_scale.setdefault(pane.picture.scale, []).append(pane)
    for scale, panes in by_scale.items():
        totals = {
            name: sum(getattr(pane.picture.counts, name) for pane in panes) for name in vars(lead.counts)
        }
        whole = replace(panes[0].picture, counts=replace(lead.counts, **totals))
        which = "" if len(by_scale) == 1 else f"{' and '.join(pane.title for pane in panes)}: "
        lines.append(f"{which}{'c' if which else 'C'}olours {scale.text}; {tally(whole)}.")
    return tuple(lines)


def probe(source: Source, picture: Picture, row: int, col: int) -> str:
    """Return the read-out of one cell, without asking for more data.

    For a single value: its global index with dim names, its token, the value in its own precision,
    and each rank that owns it with the local index there. For a bin: what it covers and all its
    reductions and counts. Raises ``IndexError`` outside the picture.
    """
    rows, cols = picture.codes.shape
    if not (0 <= row < rows and 0 <= col < cols):
        msg = f"cell ({row}, {col}) is outside {rows} x {cols}"
        raise IndexError(msg)
    if picture.overview is not None:
        return _probe_bin(source, picture, row, col)
    info = picture.info
    position = _position(picture, row, col)
    names = ", ".join(_named(source, picture, d, at, at + 1) for d, at in enumerate(position))
    found = owners(info, position)
    answering = [who for who in found if who[0] not in info.missing_ranks]
    if found and not answering:
        return f"{names}: {ranks([r for r, _ in found])} missing, the value cannot be reached"
    value = number(np.asarray(picture.tile)[row, col], info.dtype)
    if picture.veil is not None and picture.veil[row, col]:
        value = f"masked ({value})"
    text = f"{names} = {value}" if names else f"{value}"
    note = getattr(source, "note", None)
    more = f" \N{EM DASH} {visible(note(position), 400)}" if note is not None else ""
    if info.partial:
        return (f"{text} (summed over {ranks([r for r, _ in found])})" if found else text) + more
    kept = "; ".join(f"rank {rank} at {list(local)}" for rank, local in answering)
    return (f"{text} \N{EM DASH} {kept}" if kept else text) + more


def _position(picture: Picture, row: int, col: int) -> tuple[int, ...]:
    """Return the global index of the first element of a cell."""
    plane, grid = picture.plane, picture.grid
    at = dict(plane.fixed)
    at[plane.rows], at[plane.cols] = int(grid.row_edges[row]), int(grid.col_edges[col])
    return tuple(at[d] for d in range(len(picture.info.shape)))


def _named(source: Source, picture: Picture, dim: int, start: int, stop: int) -> str:
    """Return ``seq 3 "Mary"`` for a position, ``seq[3:6]`` for several."""
    name = visible(picture.info.dims[dim], 40)
    if stop > start + 1:
        return f"{name}[{span(start, stop)}]"
    if dim not in (picture.plane.rows, picture.plane.cols):
        return f"{name} {start}"
    labels = source.labels(dim, picture.plane.fixed)
    label = f' "{visible(labels[start], 80)}"' if labels and start < len(labels) else ""
    return f"{name} {start}{label}"


def _probe_bin(source: Source, picture: Picture, row: int, col: int) -> str:
    plane, grid, overview = picture.plane, picture.grid, picture.overview
    assert overview is not None
    spans = {
        plane.rows: (int(grid.row_edges[row]), int(grid.row_edges[row + 1])),
        plane.cols: (int(grid.col_edges[col]), int(grid.col_edges[col + 1])),
    }
    names = ", ".join(
        _named(source, picture, d, *spans.get(d, (plane.fixed.get(d, 0),) * 2))
        for d in range(len(picture.info.shape))
    )
    n = int(overview.n[row, col])
    size = int(np.prod([stop - start for start, stop in spans.values()]))
    masked = 0 if overview.masked is None else int(overview.masked[row, col])
    if masked == size:
        return f"{names}: {plural(size, 'value')}, all masked"
    size -= masked
    if n == 0:
        return f"{names}: {_owner_text(picture, row, col)}, the values cannot be reached"
    reached = f"{n:,} values" if n == size else f"{n:,} of {size:,} values, the others missing"
    reached += f", {masked:,} more are masked" if masked else ""
    parts = [f"{names} ({reached})"]
    if overview.finite[row, col]:
        parts += [f"{name} {short(float(getattr(overview, name)[row, col]))}" for name in REDUCER_TEXT]
    for name, counts in (("NaN", overview.nan), ("+Inf", overview.posinf), ("-Inf", overview.neginf)):
        if counts[row, col]:
            parts.append(f"{name} {int(counts[row, col]):,}")
    parts += [_peak_text(source, picture, peak) for peak in picture.peaks if _inside(peak, spans, plane)]
    return f"{parts[0]}: {', '.join(parts[1:])} \N{EM DASH} {_owner_text(picture, row, col)}"


def _inside(peak: Peak, spans: dict[int, tuple[int, int]], plane: Plane) -> bool:
    return all(
        d < 0 or spans[d][0] <= at < spans[d][1] for d, at in ((plane.rows, peak.row), (plane.cols, peak.col))
    )


def _peak_text(source: Source, picture: Picture, peak: Peak) -> str:
    """Return a ringed value with its index, in its own dtype, and where it lies on its rank."""
    info, plane = picture.info, picture.plane
    at = {**plane.fixed, plane.rows: peak.row, plane.cols: peak.col}
    position = [at[d] for d in range(len(info.shape))]
    names = ", ".join(_named(source, picture, d, i, i + 1) for d, i in enumerate(position))
    whole = info.dtype.startswith(("int", "uint"))
    kind = "float64" if whole or info.dtype.startswith("complex") else info.dtype
    about = "about " if whole and abs(peak.value) >= LAST_EXACT else ""
    found = "" if info.partial else "; ".join(f"rank {r} at {list(i)}" for r, i in owners(info, position))
    return f"with {about}{number(peak.value, kind)} at {names}" + (f" ({found})" if found else "")


def _owner_text(picture: Picture, row: int, col: int) -> str:
    """Return the owners of the ribbon segments a bin touches."""
    texts = []
    for segments, edges, at in (
        (picture.row_ribbon, picture.grid.row_edges, row),
        (picture.col_ribbon, picture.grid.col_edges, col),
    ):
        touched = [s.text for s in segments if s.start < edges[at + 1] and edges[at] < s.stop]
        if touched:
            texts.append(" and ".join(touched))
    return ", ".join(texts) or "no rank is named"


def bar(picture: Picture, steps: int = 5) -> tuple[tuple[float, str], ...]:
    """Return (share, text) of the numbers printed along the colour bar."""
    return tuple(
        (i / (steps - 1), short(colors.value_at(i / (steps - 1), picture.scale))) for i in range(steps)
    )
