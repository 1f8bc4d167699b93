"""Cells as they are typed: hooks without a body, one percent sign for two, and mistyped names of magics."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.magics.desk import Desk

_BODY = re.compile(r"x\s*(?:\[|\.|[-+*/@%&|^]?=|\*\*=|//=)")
"""How a hook's body begins that was typed below a line magic."""

_CALL = re.compile(r"get_ipython\(\)\.run_(line|cell)_magic\('([\w.]+)'")
"""What IPython makes of a magic."""


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


class NearNames:
    """Names a near magic where one of ours is mistyped: IPython says only that there is none of the name."""

    def __init__(self, shell: InteractiveShell, _desk: Desk) -> None:
        self._magics = shell.magics_manager.magics
        self._transforms = shell.input_transformers_post

    def add(self) -> None:
        """Look at every cell, once IPython has made calls of its magics."""
        self._transforms.append(self.check)

    def remove(self) -> None:
        """Look no more."""
        self._transforms.remove(self.check)

    def check(self, lines: list[str]) -> list[str]:
        """Raise :class:`SyntaxError` for a magic that is not there, if its name is nearly one of ours."""
        for number, line in enumerate("".join(lines).splitlines(), 1):
            for kind, name in _CALL.findall(line):
                magics = self._magics[kind]
                if name in magics:
                    continue
                ours = sorted(one for one in magics if one.startswith("flex"))
                if near := get_close_matches(name, ours, n=1, cutoff=0.75):
                    typed = ("%" if kind == "line" else "%%") + name
                    msg = f"there is no magic {typed}. Did you mean {typed.removesuffix(name)}{near[0]}?"
                    raise SyntaxError(msg, ("<cell>", number, 1, f"{typed}\n", number, len(typed) + 1))
        return lines
