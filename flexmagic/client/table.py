"""A small table that reads well as text and as HTML; all cells are escaped."""

from __future__ import annotations

import html
from dataclasses import dataclass

_CELL = "text-align:left;white-space:pre-wrap"
"""Blanks count: they indent a tree."""


@dataclass(frozen=True)
class Table:
    """Rows under column heads, all of them texts."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""

    def __str__(self) -> str:
        """Aligned columns, the title above."""
        widths = [
            max(len(head), *(len(row[at]) for row in self.rows)) if self.rows else len(head)
            for at, head in enumerate(self.columns)
        ]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (self.columns, tuple("─" * width for width in widths), *self.rows)
        ]
        return "\n".join(([self.title] if self.title else []) + lines)

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:  # noqa: FBT001 - IPython's signature
        del cycle
        printer.text(str(self))  # type: ignore[attr-defined]  # IPython's printer has no stubs

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{html.escape(cell)}</th>" for cell in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td style='{_CELL}'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        caption = f"<p><b>{html.escape(self.title)}</b></p>" if self.title else ""
        return f"{caption}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def size_text(nbytes: int) -> str:
    """Bytes as a person reads them: ``4.9 MB``."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
