"""The static picture: a PNG with everything a reader needs printed on it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, PngImagePlugin

from flexmagic.view import header, layout, pens, ribbon
from flexmagic.view import scale as colors
from flexmagic.view.caption import bar, caption
from flexmagic.view.picture import Look, compose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from flexmagic.view.picture import Picture
    from flexmagic.view.ribbon import Segment
    from flexmagic.view.source import Info, Source, Stats

WIDTH = 800
MOST_BYTES = 300_000
KEY = "flexmagic-picture"
"""Name of the PNG text chunk by which the live widget knows its own static picture."""

_SCALE = 2  # pixels per CSS pixel: sharp on dense screens
_MARGIN = 12
PAGE_WIDTH = WIDTH + 2 * _MARGIN
_INK, _SOFT, _RULE, _ALARM = (20, 20, 20), (80, 80, 80), (200, 200, 200), (255, 244, 206)
_LEAST_MARK = 5


def to_png(source: Source, *, look: Look | None = None, key: str = "", stats: Stats | None = None) -> bytes:
    """Return a PNG of the tensor, readable on white, of at most 300 kB.

    It moves one overview (or one small tile), and the statistics unless they are given. ``key``
    marks the file, so that a live view can find it. Raises what the source raises.
    """
    info = source.info
    look = look or Look(width=WIDTH)
    note = PngImagePlugin.PngInfo()
    note.add_text(KEY, key)
    if 0 in info.shape:
        return _encode(_compose_page(info, None, None), note)
    stats, picture = stats or source.stats(), compose(source, look)
    for scale in (_SCALE, 1):
        data = _encode(_compose_page(info, stats, picture, scale), note)
        if len(data) <= MOST_BYTES:
            break
    return data


def _encode(page: Image.Image, note: PngImagePlugin.PngInfo) -> bytes:
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True, pnginfo=note)
    return out.getvalue()


class _Page:
    """A white page that is written from top to bottom, in CSS pixels."""

    def __init__(self, width: int, scale: int) -> None:
        self.scale, self.width = scale, width
        self.y = _MARGIN
        self.image = Image.new("RGB", (width * scale, 3000 * scale), "white")
        self.draw = ImageDraw.Draw(self.image)

    def font(self, size: int, *, bold: bool = False) -> pens.Font:
        return pens.font(size * self.scale, bold=bold)

    def text(self, x: float, y: float, text: str, size: int = 11, **style: object) -> None:
        """Write one line; ``style`` is Pillow's fill and anchor."""
        bold = bool(style.pop("bold", False))
        style.setdefault("fill", _INK)
        pen = self.font(size, bold=bold)
        at = (x * self.scale, y * self.scale)
        self.draw.text(at, pens.drawable(text, pen), font=pen, **style)  # type: ignore[arg-type]

    def lines(self, text: str, size: int = 11, **style: object) -> None:
        """Write a paragraph over the full width and move on below it."""
        pen = self.font(size, bold=bool(style.get("bold")))
        for line in pens.wrap(text, pen, (self.width - 2 * _MARGIN) * self.scale):
            self.text(_MARGIN, self.y, line, size, **style)
            self.y += size + 5

    def box(self, x: float, y: float, width: float, height: float, **style: object) -> None:
        """Draw a rectangle; ``style`` is Pillow's fill and outline."""
        s = self.scale
        corners = [x * s, y * s, (x + width) * s - 1, (y + height) * s - 1]
        self.draw.rectangle(corners, **style)  # type: ignore[arg-type]

    def done(self) -> Image.Image:
        """Return what was written, cut below the last line."""
        size = (self.width * self.scale, (self.y + _MARGIN) * self.scale)
        return self.image.crop((0, 0, *size))


def _compose_page(
    info: Info, stats: Stats | None, picture: Picture | None, scale: int = _SCALE
) -> Image.Image:
    page = _Page(PAGE_WIDTH, scale)
    page.lines(header.title(info), 15, bold=True)
    page.lines("  \N{MIDDLE DOT}  ".join(header.facts(info)), 11)
    for warning in header.warnings(info):
        pen = page.font(11)
        rows = len(pens.wrap(warning, pen, (page.width - 2 * _MARGIN) * scale))
        page.box(_MARGIN - 4, page.y - 2, page.width - 2 * _MARGIN + 8, rows * 16 + 2, fill=_ALARM)
        page.lines(warning, 11)
    if stats is None or picture is None:
        page.lines("This tensor is empty: there is nothing to draw.", 11)
        return page.done()
    page.lines("   ".join(f"{name} {text}" for name, text in header.stats_pairs(stats)), 11, fill=_SOFT)
    page.y += 6
    top = page.y
    _labels(page, picture, top)
    _ribbons(page, picture, top)
    _map(page, picture, top)
    page.y = top + picture.layout.height + 8
    _color_bar(page, picture)
    for line in caption(picture):
        page.lines(line, 11, fill=_SOFT)
    return page.done()


def _map(page: _Page, picture: Picture, top: int) -> None:
    """Paint cells, marks and holes."""
    s, lay = page.scale, picture.layout
    width, height = lay.map_width * s, lay.map_height * s
    colored = colors.palette(picture.scale.kind)[picture.codes][..., :3]
    pixels = np.asarray(Image.fromarray(colored).resize((width, height), Image.Resampling.NEAREST)).copy()
    for code in (colors.UNDER, colors.OVER):
        clipped = picture.codes == code
        if np.count_nonzero(clipped) <= colors.FEW_CLIPPED:
            pixels[_area(pixels, clipped, s)] = colors.palette(picture.scale.kind)[code, :3]
    for code in (colors.NEGINF, colors.POSINF, colors.NAN):
        _mark(pixels, picture.codes == code, code, s)
    for hole in picture.holes:
        box = _pixels_of(picture, hole.rows, hole.cols, s)
        if box is not None:
            x0, y0, x1, y1 = box
            pixels[y0:y1, x0:x1] = pens.pattern(colors.HOLE, y1 - y0, x1 - x0, s)
    page.image.paste(Image.fromarray(pixels), ((_MARGIN + lay.left) * s, (top + lay.top) * s))
    page.box(_MARGIN + lay.left - 1, top + lay.top - 1, lay.map_width + 2, lay.map_height + 2, outline=_RULE)
    for hole in picture.holes:
        box = _pixels_of(picture, hole.rows, hole.cols, s)
        if box is not None:
            _name_hole(page, hole.text, box, (_MARGIN + lay.left, top + lay.top))


def _name_hole(page: _Page, text: str, box: tuple[int, ...], origin: tuple[int, int]) -> None:
    x0, y0, x1, y1 = (edge / page.scale for edge in box)
    wide = page.font(11).getlength(text) / page.scale + 10
    x, y = origin[0] + (x0 + x1) / 2, origin[1] + (y0 + y1) / 2
    page.box(x - wide / 2, y - 9, wide, 18, fill="white", outline=_INK)
    page.text(x, y, text, anchor="mm")


def _mark(pixels: NDArray[np.uint8], marked: NDArray[np.bool_], code: int, scale: int) -> None:
    """Lay a mark's pattern over its cells."""
    if marked.any():
        over = _area(pixels, marked, scale)
        pixels[over] = pens.pattern(code, pixels.shape[0], pixels.shape[1], scale)[over]


def _area(pixels: NDArray[np.uint8], marked: NDArray[np.bool_], scale: int) -> NDArray[np.bool_]:
    """Return the pixels of marked cells, each cell at least 5 CSS pixels wide and high."""
    height, width = pixels.shape[:2]
    cells = Image.fromarray(marked.astype(np.uint8) * 255)
    mask = cells.resize((width, height), Image.Resampling.NEAREST)
    cell = min(height / marked.shape[0], width / marked.shape[1])
    if cell < _LEAST_MARK * scale:
        mask = mask.filter(ImageFilter.MaxFilter(max(int(_LEAST_MARK * scale - cell) | 1, 3)))
    area: NDArray[np.bool_] = np.asarray(mask) > 0
    return area


def _pixels_of(
    picture: Picture, rows: tuple[int, int], cols: tuple[int, int], scale: int
) -> tuple[int, int, int, int] | None:
    """Return (x0, y0, x1, y1) of a box of the plane inside the map, None where it is not drawn."""
    lay, edges = picture.layout, []
    for span, window, room in (
        (cols, picture.grid.cols, lay.map_width),
        (rows, picture.grid.rows, lay.map_height),
    ):
        per = room * scale / (window[1] - window[0])
        edges.append([round((min(max(at, window[0]), window[1]) - window[0]) * per) for at in span])
    (x0, x1), (y0, y1) = edges
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _ribbons(page: _Page, picture: Picture, top: int) -> None:
    lay = picture.layout
    x, y = _MARGIN + lay.left, top + lay.top
    for segments, window, room, upright in (
        (picture.col_ribbon, picture.grid.cols, lay.map_width, False),
        (picture.row_ribbon, picture.grid.rows, lay.map_height, True),
    ):
        per = room / (window[1] - window[0])
        for segment in segments:
            start = (max(segment.start, window[0]) - window[0]) * per
            stop = (min(segment.stop, window[1]) - window[0]) * per
            if stop <= start:
                continue
            if upright:
                _segment(
                    page, segment, (x - layout.RIBBON - layout.GAP, y + start), stop - start, upright=True
                )
            else:
                _segment(page, segment, (x + start, y - layout.RIBBON - layout.GAP), stop - start)


def _segment(
    page: _Page, segment: Segment, at: tuple[float, float], length: float, *, upright: bool = False
) -> None:
    """Paint one stretch of a ribbon, with the longest name of its owners that fits."""
    x, y = at
    size = (layout.RIBBON, length) if upright else (length, layout.RIBBON)
    paint = colors.MARK_COLORS[colors.HOLE] if segment.missing else ribbon.fill(segment.color)
    ink = _INK if segment.missing else ribbon.ink(segment.color)
    page.box(x, y, *size, fill=paint, outline="white")
    pen = page.font(10, bold=True)
    numbers = ",".join(str(rank) for rank in segment.ranks)
    room = (layout.RIBBON if upright else length) - 2
    for text in (segment.text, numbers):
        if pen.getlength(text) / page.scale <= room:
            page.text(x + size[0] / 2, y + size[1] / 2, text, 10, bold=True, fill=ink, anchor="mm")
            return


def _labels(page: _Page, picture: Picture, top: int) -> None:
    """Write row labels and numbers on the left, column labels above or numbers below."""
    lay, grid = picture.layout, picture.grid
    x, y = _MARGIN + lay.left, top + lay.top
    if picture.plane.rows >= 0:
        per = lay.map_height / (grid.rows[1] - grid.rows[0])
        pen = page.font(10)
        right = _MARGIN + lay.row_label_space - 6
        for at in layout.ticks(grid.rows, lay.map_height, layout.LINE):
            middle = y + (at - grid.rows[0] + 0.5) * per
            number = f"{at}"
            page.text(right, middle, number, 10, fill=_SOFT, anchor="rm")
            if picture.row_labels:
                room = lay.row_label_space - 12 - pen.getlength(str(grid.rows[1])) / page.scale
                label = pens.fit(picture.row_labels[at], pen, room * page.scale)
                page.text(_MARGIN, middle, label, 10, anchor="lm")
    if picture.plane.cols < 0:
        return
    per = lay.map_width / (grid.cols[1] - grid.cols[0])
    for at in layout.ticks(grid.cols, lay.map_width, 56):
        middle = x + (at - grid.cols[0] + 0.5) * per
        page.text(middle, y + lay.map_height + 4, f"{at}", 10, fill=_SOFT, anchor="mt")
    if picture.col_labels and lay.col_label_space and per >= layout.LINE - 2:
        _column_labels(page, picture.col_labels, range(*grid.cols), per, (x, top))


def _column_labels(
    page: _Page, labels: Sequence[str], window: range, per: float, at: tuple[float, float]
) -> None:
    """Write column labels upright, reading from bottom to top."""
    pen, s = page.font(10), page.scale
    room = layout.TALLEST_LABEL
    for i, position in enumerate(window):
        text = pens.fit(labels[position], pen, (room - 4) * s)
        strip = Image.new("RGB", (room * s, 14 * s), "white")
        ImageDraw.Draw(strip).text((0, 7 * s), text, font=pen, fill=_INK, anchor="lm")
        wide = int(pen.getlength(text)) + 2
        upright = strip.crop((0, 0, wide, 14 * s)).rotate(90, expand=True)
        bottom = at[1] + _column_room(labels)
        page.image.paste(
            upright, (int((at[0] + (i + 0.5) * per) * s) - 7 * s, int(bottom * s) - upright.height)
        )


def _column_room(labels: Sequence[str]) -> float:
    return min(max(len(text) for text in labels) * layout.CHAR + 6, layout.TALLEST_LABEL) - 2


def _color_bar(page: _Page, picture: Picture) -> None:
    """Paint the colour bar with its numbers, the colours of clipped cells and the marks."""
    s, x, y, wide = page.scale, _MARGIN + 16, page.y, 240
    table = colors.palette(picture.scale.kind)[:, :3]
    ramp = table[colors.FIRST : colors.LAST + 1][None]
    strip = Image.fromarray(ramp).resize((wide * s, 10 * s), Image.Resampling.NEAREST)
    page.image.paste(strip, (x * s, y * s))
    page.box(x - 14, y, 10, 10, fill=tuple(table[colors.UNDER].tolist()))
    page.box(x + wide + 4, y, 10, 10, fill=tuple(table[colors.OVER].tolist()))
    for share, text in bar(picture):
        page.text(x + share * wide, y + 13, text, 10, fill=_SOFT, anchor="mt")
    at = x + wide + 34.0
    page.text(at - 16, y + 5, "clipped", 10, fill=_SOFT, anchor="lm")
    at += page.font(10).getlength("clipped") / s
    names = {colors.NAN: "NaN", colors.POSINF: "+Inf", colors.NEGINF: "-Inf", colors.HOLE: "missing"}
    for code, name in names.items():
        swatch = Image.fromarray(pens.pattern(code, 12 * s, 16 * s, s))
        page.image.paste(swatch, (int(at * s), (y - 1) * s))
        page.text(at + 20, y + 5, name, 10, fill=_SOFT, anchor="lm")
        at += 34 + page.font(10).getlength(name) / s
    page.y += 32
