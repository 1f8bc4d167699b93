"""The view of a text that grows while a cell runs: it asks, since a running cell must not publish to it."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from IPython.display import display

from flexmagic.view.display import live, picture
from flexmagic.view.growing import GrowingText
from flexmagic.view.text import heading
from flexmagic.view.widget import TensorView

if TYPE_CHECKING:
    from collections.abc import Sequence


class Stream:
    """The view, from its showing to :meth:`end`, which leaves what a saved notebook shows."""

    def __init__(self, title: str) -> None:
        self._text, self._key = GrowingText(title), uuid.uuid4().hex
        display(live(TensorView(self._text, selected=title, picture_key=self._key)), raw=True)

    def grow(self, tokens: Sequence[tuple[str, float | None]]) -> None:
        """Take all tokens that there are by now."""
        self._text.grow(tokens)

    def end(self) -> None:
        """Say that no more tokens come, and show header and picture."""
        self._text.end()
        still, drawn = picture(self._text.now, self._key)
        display({"text/plain": heading(self._text.now)}, raw=True)
        display(still, raw=True, metadata=drawn)
