"""Pictures that are no maps, painted on a page: lines, and text with a colour per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from flexmagic.view import layout, pens, ribbon
from flexmagic.view import scale as colors
from flexmagic.view.lines import INKS, curves_of
from flexmagic.view.page import INK, RULE, SOFT

if TYPE_CHECKING:
    from flexmagic.view.page import Page
    from flexmagic.view.picture import Picture

_TOKEN, _TALL = 13, 24


def paint_lines(page: Page, picture: Picture, top: int) -> int:
    """Paint the rows of a picture as lines, and their names below; return the height."""
    lay, found = picture.layout, curves_of(picture)
    x0, y0, wide, tall = page.left + lay.left, top + lay.top, lay.map_width, lay.map_height
    page.box(x0, y0, wide, tall, outline=RULE)

    def height(value: float) -> float:
        return y0 + tall - (value - found.low) / (found.high - found.low) * tall

    def across(col: int) -> float:
        start, stop = picture.grid.col_edges[col : col + 2]
        first, last = picture.grid.cols
        return float(x0 + ((start + stop) / 2 - first) / (last - first) * wide)

    for value, text in found.ticks:
        page.box(x0, height(value), wide, 1 / page.scale, fill=RULE)
        page.text(x0 - 6, height(value), text, 10, fill=SOFT, anchor="rm")
    for r, row in enumerate(found.values):
        ink = INKS[r % len(INKS)]
        for run in _runs(row):
            points = [(across(c), height(v)) for c in run if (v := row[c]) is not None]
            page.stroke(points, ink, dashed=r >= len(INKS))
            for x, y in points if len(row) * 12 < wide else points[:1]:
                page.ring(x, y, 2, ink, 2)
        for c, code in enumerate(picture.codes[r].tolist()):
            if colors.NAN <= code <= colors.NEGINF:
                mark = Image.fromarray(pens.pattern(code, 8 * page.scale, 8 * page.scale, page.scale))
                low = tall - 8 if code == colors.NEGINF else 0
                page.image.paste(mark, (round((across(c) - 4) * page.scale), round((y0 + low) * page.scale)))
    for at in layout.ticks(picture.grid.cols, wide, 56):
        first, last = picture.grid.cols
        label = picture.col_labels[at] if picture.col_labels else str(at)
        page.text(
            x0 + (at + 0.5 - first) / (last - first) * wide, y0 + tall + 4, label, 10, fill=SOFT, anchor="mt"
        )
    return lay.height + _names(page, found.names, top + lay.height)


def _names(page: Page, names: tuple[str, ...], top: float) -> int:
    """Write the names of lines beside a stroke of each; return the height of that."""
    if not names:
        return 0
    x, y, pen = float(page.left), top + 8, page.font(11)
    for i, name in enumerate(names):
        wide = 30 + pen.getlength(name) / page.scale
        if x > page.left and x + wide > page.width:
            x, y = float(page.left), y + 16
        page.stroke([(x, y), (x + 22, y)], INKS[i % len(INKS)], dashed=i >= len(INKS))
        page.text(x + 26, y, name, 11, fill=INK, anchor="lm")
        x += wide + 16
    return round(y + 12 - top)


def _runs(row: tuple[float | None, ...]) -> list[list[int]]:
    """Return stretches of positions that have values."""
    runs: list[list[int]] = [[]]
    for c, value in enumerate(row):
        if value is not None:
            runs[-1].append(c)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def paint_strip(page: Page, picture: Picture, top: int) -> int:
    """Paint labels as text, each on the colour of its value; return the height."""
    table = colors.palette(picture.scale.kind)[:, :3]
    first, last = picture.grid.cols
    x, y, pen = float(page.left), float(top), page.font(_TOKEN)
    for i, text in enumerate((picture.col_labels or ())[first:last]):
        code = int(picture.codes[0, i]) if i < picture.codes.shape[1] else colors.HOLE
        shown = text + (f" {pens.MARK_NAMES[code]}" if code in pens.MARK_NAMES else "")
        wide = pen.getlength(pens.drawable(shown, pen)) / page.scale + 8
        if x > page.left and x + wide > page.width - page.left:
            x, y = float(page.left), y + _TALL
        red, green, blue = (int(part) for part in table[code])
        page.box(x, y, wide, _TALL - 4, fill=(red, green, blue))
        page.text(
            x + 4, y + _TALL / 2 - 2, shown, _TOKEN, fill=ribbon.ink_on((red, green, blue)), anchor="lm"
        )
        x += wide + 2
    return round(y + _TALL - top)
