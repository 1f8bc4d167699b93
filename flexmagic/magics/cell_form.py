"""Cells of hooks as they are typed: without a body, and with one percent sign for two."""

from __future__ import annotations

import re

_BODY = re.compile(r"x\s*(?:\[|\.|[-+*/@%&|^]?=|\*\*=|//=)")
"""How a hook's body begins that was typed below a line magic."""


def allow_empty_body(lines: list[str]) -> list[str]:
    """Add an empty line below a ``%%flexhook`` line that has nothing below it: IPython refuses that."""
    if lines and lines[0].startswith("%%flexhook") and not "".join(lines[1:]):
        return [lines[0].rstrip("\n") + "\n", "\n"]
    return lines


def ask_for_two_signs(lines: list[str]) -> list[str]:
    """Raise :class:`SyntaxError` for a body below ``%flexhook``, of which only the first line would count."""
    if len(lines) > 1 and lines[0].startswith("%flexhook ") and _BODY.match(lines[1]):
        msg = f"a hook's body needs two percent signs above it: %{lines[0].strip()}"
        raise SyntaxError(msg, ("<cell>", 1, 1, lines[0], 1, len("%flexhook") + 1))
    return lines


TRANSFORMS = (allow_empty_body, ask_for_two_signs)
"""What IPython does with every cell before it is read as Python."""
