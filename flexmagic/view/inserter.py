"""Putting a new cell into the notebook from a panel, where the front end lets one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget

if TYPE_CHECKING:
    from collections.abc import Callable

_STATIC = Path(__file__).parent / "static"


class CellInserter(anywidget.AnyWidget):
    """An invisible part of a panel that puts a cell below the panel's own in JupyterLab and Notebook 7.

    ``said`` hears whether it was done; elsewhere it is not.
    """

    _esm = "\n".join((_STATIC / name).read_text("utf-8") for name in ("insert_cell.js", "insert.js"))

    def __init__(self, said: Callable[[bool], None]) -> None:
        super().__init__()
        self.on_msg(lambda _widget, content, _buffers: said(bool(content.get("done"))))

    def insert(self, text: str) -> None:
        """Put a cell with this text below."""
        message: dict[str, Any] = {"text": text, "id": 1}
        self.send(message)
