"""A panel's line for messages, and how panels look."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

_STATIC = Path(__file__).parent / "static"


class Said(anywidget.AnyWidget):
    """A line that stays while its ``text`` changes, so that a screen reader hears of it; shown as text."""

    _esm = (_STATIC / "said.js").read_text("utf-8")
    _css = (_STATIC / "panel.css").read_text("utf-8")
    text = traitlets.Unicode("").tag(sync=True)
