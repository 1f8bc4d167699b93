"""Completing the dotted name of a module: the next part of it, wildcards and choices as in patterns. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from flexmagic.errors import SiteError
from flexmagic.layout.patterns import path_matches

_Tree = dict[str, Any]
"""A node per part of a name, with the nodes below it."""

_DOT = re.compile(r"\.(?![^{]*\})")
"""A dot that is not inside braces, as those of ``{2..5}`` are."""


class Names:
    """The names of a model's modules as a tree, so that completing looks at no more than it offers."""

    def __init__(self, names: Iterable[str]) -> None:
        self._root: _Tree = {}
        for name in names:
            node = self._root
            for part in name.split(".") if name else ():
                node = node.setdefault(part, {})

    def below(self, typed: str) -> list[str]:
        """What can follow ``typed`` up to the next dot, whole names, in the model's order.

        A ``*`` is offered where numbers follow. A name that is whole already is followed by what is
        inside of it.
        """
        *above, last = _DOT.split(typed)
        nodes = self._at(above)
        parts = list(dict.fromkeys(part for node in nodes for part in node if part.startswith(last)))
        if not last and sum(part.isdigit() for part in parts) > 1:
            parts.insert(0, "*")
        stem = "".join(f"{part}." for part in above)
        found = [stem + part for part in parts]
        inside = self._at([*above, last]) if last else []
        return found + [f"{typed}.{part}" for part in dict.fromkeys(p for node in inside for p in node)]

    def __contains__(self, pattern: str) -> bool:
        """Whether a name, or one that a pattern names, is there."""
        return bool(self._at(_DOT.split(pattern)))

    def _at(self, parts: Sequence[str]) -> list[_Tree]:
        """The nodes that a dotted pattern leads to."""
        nodes = [self._root]
        for part in parts:
            if any(letter in part for letter in "*{"):
                nodes = [below for node in nodes for name, below in node.items() if _fits(part, name)]
            else:
                nodes = [node[part] for node in nodes if part in node]
        return nodes


def _fits(pattern: str, part: str) -> bool:
    try:
        return path_matches(pattern, part)
    except SiteError:  # still being typed
        return False
