"""The static picture: a PNG with everything a reader needs printed on it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image, PngImagePlugin

from flexmagic.view import header, pens
from flexmagic.view import scale as colors
from flexmagic.view.caption import bar, sheet_caption
from flexmagic.view.draw import paint
from flexmagic.view.page import ALARM, INK, MARGIN, SOFT, Page
from flexmagic.view.picture import Look
from flexmagic.view.sheet import GAP, compose_sheet
from flexmagic.view.source import LINES
from flexmagic.view.table import disagreements

if TYPE_CHECKING:
    from flexmagic.view.picture import Picture
    from flexmagic.view.sheet import Sheet
    from flexmagic.view.source import Info, Source, Stats

WIDTH = 800
MOST_BYTES = 300_000
KEY = "flexmagic-picture"
"""Name of the PNG text chunk by which the live widget knows its own static picture."""

_SCALE = 2  # pixels per CSS pixel: sharp on dense screens
PAGE_WIDTH = WIDTH + 2 * MARGIN


def to_png(source: Source, *, look: Look | None = None, key: str = "", stats: Stats | None = None) -> bytes:
    """Return a PNG of the tensor, readable on white, of at most 300 kB.

    It moves one overview (or one small tile), digests of replicas, and the statistics unless they are
    given. ``key`` marks the file, so that a live view can find it. Raises what the source raises.
    """
    info = source.info
    look = look or Look(width=WIDTH)
    note = PngImagePlugin.PngInfo()
    note.add_text(KEY, key)
    if 0 in info.shape:
        return _encode(_compose_page(info, header.warnings(info), None, None), note)
    stats, sheet = stats or source.stats(), compose_sheet(source, look)
    warnings = (*header.warnings(source.info), *header.odd_values(stats), *disagreements(source))
    for scale in (_SCALE, 1):
        data = _encode(_compose_page(source.info, warnings, stats, sheet, scale), note)
        if len(data) <= MOST_BYTES:
            break
    return data


def _encode(page: Image.Image, note: PngImagePlugin.PngInfo) -> bytes:
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True, pnginfo=note)
    return out.getvalue()


def _compose_page(
    info: Info, warnings: tuple[str, ...], stats: Stats | None, sheet: Sheet | None, scale: int = _SCALE
) -> Image.Image:
    page = Page(PAGE_WIDTH, scale)
    page.lines(header.title(info), 15, bold=True)
    page.lines("  \N{MIDDLE DOT}  ".join(header.facts(info)), 11)
    for warning in warnings:
        pen = page.font(11)
        rows = len(pens.wrap(warning, pen, (page.width - 2 * MARGIN) * scale))
        page.box(MARGIN - 4, page.y - 2, page.width - 2 * MARGIN + 8, rows * 16 + 2, fill=ALARM)
        page.lines(warning, 11)
    if stats is None or sheet is None:
        page.lines("This tensor is empty: there is nothing to draw.", 11)
        return page.done()
    page.lines("   ".join(f"{name} {text}" for name, text in header.stats_pairs(stats)), 11, fill=SOFT)
    page.y += 6
    _panes(page, sheet)
    if sheet.lead.info.form != LINES:
        for scale_of in dict.fromkeys(pane.picture.scale for pane in sheet.panes):
            _color_bar(page, next(p.picture for p in sheet.panes if p.picture.scale == scale_of))
    for line in sheet_caption(sheet):
        page.lines(line, 11, fill=SOFT)
    return page.done()


def _panes(page: Page, sheet: Sheet) -> None:
    """Paint the pictures from left to right, and go on below them."""
    low = page.y
    for pane in sheet.panes:
        wide = pane.picture.layout.width
        if page.left > MARGIN and page.left + wide > page.width:
            page.left, page.y = MARGIN, low + GAP // 2
        top = page.y
        if pane.title:
            title = pens.fit(pane.title, page.font(11, bold=True), wide * page.scale)
            page.text(page.left, top, title, 11, bold=True, fill=INK)
            top += 16
        low = max(low, top + paint(page, pane.picture, top) + 8)
        page.left += wide + GAP
    page.left, page.y = MARGIN, low


def _color_bar(page: Page, picture: Picture) -> None:
    """Paint the colour bar with its numbers, the colours of clipped cells and the marks."""
    s, x, y, wide = page.scale, MARGIN + 16, page.y, 240
    table = colors.palette(picture.scale.kind)[:, :3]
    ramp = table[colors.FIRST : colors.LAST + 1][None]
    strip = Image.fromarray(ramp).resize((wide * s, 10 * s), Image.Resampling.NEAREST)
    page.image.paste(strip, (x * s, y * s))
    page.box(x - 14, y, 10, 10, fill=tuple(table[colors.UNDER].tolist()))
    page.box(x + wide + 4, y, 10, 10, fill=tuple(table[colors.OVER].tolist()))
    for share, text in bar(picture):
        page.text(x + share * wide, y + 13, text, 10, fill=SOFT, anchor="mt")
    at = x + wide + 34.0
    page.text(at - 16, y + 5, "clipped", 10, fill=SOFT, anchor="lm")
    at += page.font(10).getlength("clipped") / s
    for code, name in pens.MARK_NAMES.items():
        swatch = Image.fromarray(pens.pattern(code, 12 * s, 16 * s, s))
        page.image.paste(swatch, (int(at * s), (y - 1) * s))
        page.text(at + 20, y + 5, name, 10, fill=SOFT, anchor="lm")
        at += 34 + page.font(10).getlength(name) / s
    page.y += 32
