"""Let ``%%flexhook SITES`` stand alone in a cell: IPython refuses cell magics with an empty body."""

from __future__ import annotations


def allow_empty_body(lines: list[str]) -> list[str]:
    """Add an empty line below a ``%%flexhook`` line that has nothing below it."""
    if lines and lines[0].startswith("%%flexhook") and not "".join(lines[1:]):
        return [lines[0].rstrip("\n") + "\n", "\n"]
    return lines
