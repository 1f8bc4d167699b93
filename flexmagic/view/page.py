"""A page that is painted in Python, from top to bottom, in CSS pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from PIL import Image, ImageDraw

from flexmagic.view import pens

MARGIN = 12
INK, SOFT, RULE, ALARM = (20, 20, 20), (80, 80, 80), (200, 200, 200), (255, 244, 206)


class Page:
    """A white page that is written from top to bottom, in CSS pixels; ``left`` is where pictures begin."""

    def __init__(self, width: int, scale: int) -> None:
        self.scale, self.width = scale, width
        self.y = self.left = MARGIN
        self.image = Image.new("RGB", (width * scale, 3000 * scale), "white")
        self.draw = ImageDraw.Draw(self.image)

    def font(self, size: int, *, bold: bool = False) -> pens.Font:
        """Return the font of a size in CSS pixels."""
        return pens.font(size * self.scale, bold=bold)

    def text(self, x: float, y: float, text: str, size: int = 11, **style: object) -> None:
        """Write one line; ``style`` is Pillow's fill and anchor."""
        bold = bool(style.pop("bold", False))
        style.setdefault("fill", INK)
        pen = self.font(size, bold=bold)
        at = (x * self.scale, y * self.scale)
        self.draw.text(at, pens.drawable(text, pen), font=pen, **style)  # type: ignore[arg-type]

    def lines(self, text: str, size: int = 11, **style: object) -> None:
        """Write a paragraph over the full width and move on below it."""
        pen = self.font(size, bold=bool(style.get("bold")))
        for line in pens.wrap(text, pen, (self.width - 2 * MARGIN) * self.scale):
            self.text(MARGIN, self.y, line, size, **style)
            self.y += size + 5

    def box(self, x: float, y: float, width: float, height: float, **style: object) -> None:
        """Draw a rectangle; ``style`` is Pillow's fill and outline."""
        s = self.scale
        corners = [x * s, y * s, (x + width) * s - 1, (y + height) * s - 1]
        self.draw.rectangle(corners, **style)  # type: ignore[arg-type]

    def ring(self, x: float, y: float, radius: float, ink: str, line: float) -> None:
        """Draw a circle around a point."""
        s = self.scale
        corners = [(x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s]
        self.draw.ellipse(corners, outline=ink, width=round(line * s))

    def stroke(self, points: Sequence[tuple[float, float]], ink: str, *, dashed: bool = False) -> None:
        """Draw a line through points."""
        s = self.scale
        for n, (a, b) in enumerate(pairwise(_walk(points) if dashed else points)):
            if not (dashed and n % 2):
                self.draw.line([a[0] * s, a[1] * s, b[0] * s, b[1] * s], fill=ink, width=2 * s)

    def hatch(self, at: tuple[float, float], area: tuple[float, float], ink: tuple[int, int, int]) -> None:
        """Draw stripes over a rectangle."""
        s = self.scale
        size = (max(round(area[0] * s), 1), max(round(area[1] * s), 1))
        mask = Image.new("L", size, 0)
        pen = ImageDraw.Draw(mask)
        for start in range(-size[1], size[0], 6 * s):
            pen.line([start, size[1], start + size[1], 0], fill=140, width=s)
        self.image.paste(Image.new("RGB", size, ink), (round(at[0] * s), round(at[1] * s)), mask)

    def done(self) -> Image.Image:
        """Return what was written, cut below the last line."""
        size = (self.width * self.scale, (self.y + MARGIN) * self.scale)
        return self.image.crop((0, 0, *size))


DASH = 5.0


def _walk(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield points along a line, a dash apart."""
    for a, b in pairwise(points):
        steps = max(round(math.dist(a, b) / DASH), 1)
        for i in range(steps):
            yield a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps
    if points:
        yield points[-1]
