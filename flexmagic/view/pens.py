"""Fonts and patterns for pictures that are painted in Python."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from flexmagic.view import scale as colors
from flexmagic.view.words import SPACE

Font = ImageFont.FreeTypeFont

_FAMILIES = (
    ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    ("Arial Unicode.ttf", "Arial Bold.ttf"),
    ("segoeui.ttf", "segoeuib.ttf"),
)
_NEVER_A_GLYPH = "\uffff"


@lru_cache(maxsize=32)
def font(size: int, *, bold: bool = False) -> Font:
    """Return a font with many scripts where the system has one, else Pillow's own."""
    for names in _FAMILIES:
        try:
            return ImageFont.truetype(names[bold], size)
        except OSError:
            continue
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found


@lru_cache(maxsize=4096)
def _has(char: str, *, size: int) -> bool:
    pen = font(size)
    return char.isascii() or bytes(pen.getmask(char)) != bytes(pen.getmask(_NEVER_A_GLYPH))


def drawable(text: str, pen: Font) -> str:
    """Return ``text`` with what the font cannot draw as escapes, so that nothing is an empty box."""
    size = int(pen.size)
    return "".join(
        char if _has(char, size=size) else "_" if char == SPACE else f"\\u{ord(char):04x}" for char in text
    )


def wrap(text: str, pen: Font, width: float) -> list[str]:
    """Break ``text`` into lines of at most ``width`` pixels, between words where possible."""
    lines, line = [], ""
    for word in drawable(text, pen).split(" "):
        longer = f"{line} {word}" if line else word
        if pen.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while pen.getlength(word) > width:
            fit = max(int(len(word) * width / pen.getlength(word)) - 1, 1)
            lines.append(word[:fit])
            word = word[fit:]  # noqa: PLW2901 - the rest of an endless word is the next one
        line = word
    return [*lines, line] if line else lines


def fit(text: str, pen: Font, width: float) -> str:
    """Cut ``text`` to ``width`` pixels, with an ellipsis where something is missing."""
    text = drawable(text, pen)
    if pen.getlength(text) <= width:
        return text
    while text and pen.getlength(text + "\N{HORIZONTAL ELLIPSIS}") > width:
        text = text[:-1]
    return text + "\N{HORIZONTAL ELLIPSIS}"


def pattern(code: int, height: int, width: int, scale: int) -> NDArray[np.uint8]:
    """Return the pattern of a mark, ``(height, width, 3)``: told apart without any colour too.

    NaN has diagonal stripes, +Inf upright ones, -Inf lying ones, a hole wide diagonal ones, what is
    masked dots.
    """
    y, x = np.mgrid[0:height, 0:width] // scale
    stripes = {
        colors.NAN: (x + y) % 4 < 2,
        colors.POSINF: x % 4 < 2,
        colors.NEGINF: y % 4 < 2,
        colors.HOLE: (x + y) % 8 < 2,
        colors.MASKED: ((x + y) % 8 < 2) & ((x - y) % 8 < 2),
    }[code]
    out = np.empty((height, width, 3), dtype=np.uint8)
    out[:] = STRIPES[code]
    out[~stripes] = colors.MARK_COLORS[code]
    return out


STRIPES = {
    colors.NAN: (255, 221, 51),
    colors.POSINF: (255, 255, 255),
    colors.NEGINF: (255, 255, 255),
    colors.HOLE: (110, 110, 110),
    colors.MASKED: (150, 150, 158),
}

MARK_NAMES = {
    colors.NAN: "NaN",
    colors.POSINF: "+Inf",
    colors.NEGINF: "-Inf",
    colors.MASKED: "masked",
    colors.HOLE: "missing",
}
