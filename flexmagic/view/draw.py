"""A picture painted on a page: its map, marks, ribbons and labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from flexmagic.view import layout, pens, ribbon
from flexmagic.view import scale as colors
from flexmagic.view.draw_forms import paint_lines, paint_strip
from flexmagic.view.page import INK, RULE, SOFT
from flexmagic.view.source import LINES, STRIP
from flexmagic.view.words import token

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic.view.page import Page
    from flexmagic.view.picture import Picture
    from flexmagic.view.ribbon import Segment

_LEAST_MARK = 5
LEAST_WIDE = 26
_RING = 7


def paint(page: Page, picture: Picture, top: int) -> int:
    """Paint a picture at the page's ``left`` and at ``top``; return its height."""
    if picture.info.form == LINES:
        return paint_lines(page, picture, top)
    if picture.info.form == STRIP and picture.col_labels:
        return paint_strip(page, picture, top)
    _labels(page, picture, top)
    _ribbons(page, picture, top)
    _map(page, picture, top)
    return picture.layout.height


def _map(page: Page, picture: Picture, top: int) -> None:
    """Paint cells, marks and holes."""
    s, lay = page.scale, picture.layout
    width, height = lay.map_width * s, lay.map_height * s
    colored = colors.palette(picture.scale.kind)[picture.codes][..., :3]
    pixels = np.asarray(Image.fromarray(colored).resize((width, height), Image.Resampling.NEAREST)).copy()
    for code in (colors.UNDER, colors.OVER):
        clipped = picture.codes == code
        if np.count_nonzero(clipped) <= colors.FEW_CLIPPED:
            pixels[_area(pixels, clipped, s)] = colors.palette(picture.scale.kind)[code, :3]
    for code in (colors.MASKED, colors.NEGINF, colors.POSINF, colors.NAN):
        _mark(pixels, picture.codes == code, code, s)
    for hole in picture.holes:
        box = _pixels_of(picture, hole.rows, hole.cols, s)
        if box is not None:
            x0, y0, x1, y1 = box
            pixels[y0:y1, x0:x1] = pens.pattern(colors.HOLE, y1 - y0, x1 - x0, s)
    page.image.paste(Image.fromarray(pixels), ((page.left + lay.left) * s, (top + lay.top) * s))
    _write(page, picture, (page.left + lay.left, top + lay.top))
    page.box(page.left + lay.left - 1, top + lay.top - 1, lay.map_width + 2, lay.map_height + 2, outline=RULE)
    for hole in picture.holes:
        box = _pixels_of(picture, hole.rows, hole.cols, s)
        if box is not None:
            _name_hole(page, hole.text, box, (page.left + lay.left, top + lay.top))
    for peak in picture.peaks:
        across = (peak.col + 0.5 - picture.grid.cols[0]) / (picture.grid.cols[1] - picture.grid.cols[0])
        down = (peak.row + 0.5 - picture.grid.rows[0]) / (picture.grid.rows[1] - picture.grid.rows[0])
        x, y = page.left + lay.left + across * lay.map_width, top + lay.top + down * lay.map_height
        for ink, line in (("white", 4), ("black", 2)):
            page.ring(x, y, _RING + line / 2, ink, line)


def _write(page: Page, picture: Picture, origin: tuple[int, int]) -> None:
    """Write what a source has to say in each cell, where there is room to read it."""
    if picture.texts is None:
        return
    lay, (rows, cols) = picture.layout, picture.codes.shape
    wide, tall = lay.map_width / cols, lay.map_height / rows
    if wide < LEAST_WIDE or tall < layout.LINE:
        return
    pen, table = page.font(10), colors.palette(picture.scale.kind)[:, :3].tolist()
    for r, c in np.ndindex(rows, cols):
        text = pens.fit(token(str(picture.texts[r, c]), 12), pen, (wide - 3) * page.scale)
        red, green, blue = table[picture.codes[r, c]]
        x, y = origin[0] + (c + 0.5) * wide, origin[1] + (r + 0.5) * tall
        page.text(x, y, text, 10, fill=ribbon.ink_on((red, green, blue)), anchor="mm")


def _name_hole(page: Page, text: str, box: tuple[int, ...], origin: tuple[int, int]) -> None:
    x0, y0, x1, y1 = (edge / page.scale for edge in box)
    wide = page.font(11).getlength(text) / page.scale + 10
    x, y = origin[0] + (x0 + x1) / 2, origin[1] + (y0 + y1) / 2
    page.box(x - wide / 2, y - 9, wide, 18, fill="white", outline=INK)
    page.text(x, y, text, anchor="mm")


def _mark(pixels: NDArray[np.uint8], marked: NDArray[np.bool_], code: int, scale: int) -> None:
    """Lay a mark's pattern over its cells."""
    if marked.any():
        over = _area(pixels, marked, scale, least=0 if code == colors.MASKED else _LEAST_MARK)
        pixels[over] = pens.pattern(code, pixels.shape[0], pixels.shape[1], scale)[over]


def _area(
    pixels: NDArray[np.uint8], marked: NDArray[np.bool_], scale: int, least: int = _LEAST_MARK
) -> NDArray[np.bool_]:
    """Return the pixels of marked cells, each cell at least ``least`` CSS pixels wide and high."""
    height, width = pixels.shape[:2]
    cells = Image.fromarray(marked.astype(np.uint8) * 255)
    mask = cells.resize((width, height), Image.Resampling.NEAREST)
    cell = min(height / marked.shape[0], width / marked.shape[1])
    if cell < least * scale:
        mask = mask.filter(ImageFilter.MaxFilter(max(int(least * scale - cell) | 1, 3)))
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


def _ribbons(page: Page, picture: Picture, top: int) -> None:
    lay = picture.layout
    x, y = page.left + lay.left, top + lay.top
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
    page: Page, segment: Segment, at: tuple[float, float], length: float, *, upright: bool = False
) -> None:
    """Paint one stretch of a ribbon, with the longest name of its owners that fits."""
    x, y = at
    size = (layout.RIBBON, length) if upright else (length, layout.RIBBON)
    paint = colors.MARK_COLORS[colors.HOLE] if segment.missing else ribbon.fill(segment.color)
    ink = INK if segment.missing else ribbon.ink(segment.color)
    page.box(x, y, *size, fill=paint, outline="white")
    if segment.hatched and not segment.missing:
        page.hatch((x, y), size, ink)
    pen = page.font(10, bold=True)
    room = (layout.RIBBON if upright else length) - 2
    for text in (segment.text, segment.short):
        if pen.getlength(text) / page.scale <= room:
            page.text(x + size[0] / 2, y + size[1] / 2, text, 10, bold=True, fill=ink, anchor="mm")
            return


def _labels(page: Page, picture: Picture, top: int) -> None:
    """Write row labels and numbers on the left, column labels above or numbers below."""
    lay, grid = picture.layout, picture.grid
    x, y = page.left + lay.left, top + lay.top
    if picture.plane.rows >= 0:
        per = lay.map_height / (grid.rows[1] - grid.rows[0])
        pen = page.font(10)
        right = page.left + lay.row_label_space - 6
        for at in layout.ticks(grid.rows, lay.map_height, layout.ROW_APART):
            middle = y + (at - grid.rows[0] + 0.5) * per
            number = f"{at}"
            page.text(right, middle, number, 10, fill=SOFT, anchor="rm")
            if picture.row_labels:
                room = lay.row_label_space - 12 - pen.getlength(str(grid.rows[1])) / page.scale
                label = pens.fit(picture.row_labels[at], pen, room * page.scale)
                page.text(page.left, middle, label, 10, anchor="lm")
    if picture.plane.cols < 0:
        return
    per = lay.map_width / (grid.cols[1] - grid.cols[0])
    for at in layout.ticks(grid.cols, lay.map_width, 56):
        middle = x + (at - grid.cols[0] + 0.5) * per
        page.text(middle, y + lay.map_height + 4, f"{at}", 10, fill=SOFT, anchor="mt")
    if picture.col_labels and lay.col_label_space and per >= layout.LINE - 2:
        _column_labels(page, picture, range(*grid.cols), (x, top))


def _column_labels(page: Page, picture: Picture, window: range, at: tuple[float, float]) -> None:
    """Write column labels upright, reading from bottom to top."""
    labels, room = picture.col_labels or (), picture.layout.col_label_space
    pen, s, per = page.font(10), page.scale, picture.layout.map_width / len(window)
    for i, position in enumerate(window):
        text = pens.fit(labels[position], pen, (room - 4) * s)
        strip = Image.new("RGB", (room * s, 14 * s), "white")
        ImageDraw.Draw(strip).text((0, 7 * s), text, font=pen, fill=INK, anchor="lm")
        wide = int(pen.getlength(text)) + 2
        upright = strip.crop((0, 0, wide, 14 * s)).rotate(90, expand=True)
        bottom = at[1] + room - 2
        page.image.paste(
            upright, (int((at[0] + (i + 0.5) * per) * s) - 7 * s, int(bottom * s) - upright.height)
        )
