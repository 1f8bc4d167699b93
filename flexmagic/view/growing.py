"""A generated text while it grows, as the viewer's coloured text. Pure, numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.source import STRIP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexmagic.view.arrays import Labels


class GrowingText:
    """What is there by now of a text: tokens in the colour of how likely the model held each.

    ``now`` is a new :class:`Source` after each :meth:`grow`, so that a look never sees half of two.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self.now: Grown
        self.grow(())

    def grow(self, tokens: Sequence[tuple[str, float | None]], *, growing: bool = True) -> None:
        """Take all tokens that there are by now; those of which no likelihood is known are masked."""
        values = np.array([0.0 if chance is None else chance for _, chance in tokens])
        unknown = np.array([chance is None for _, chance in tokens], dtype=bool)
        facts = {"dims": ("token",), "pieces": (), "form": STRIP, "nbytes": 0}
        info = info_of(values, site=self._title, run="how likely the model held each token", **facts)
        labels: Labels = {0: [text for text, _ in tokens]}
        made = Grown(values, info, labels, masked=unknown if unknown.any() else None)
        made.growing = growing
        self.now = made

    def end(self) -> None:
        """Say that no more tokens come."""
        self.now.growing = False


class Grown(ArraySource):
    """A text at one moment; a view of it asks again while it is ``growing``."""

    growing = True
