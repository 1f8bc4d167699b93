"""Shift-Tab on the name of a site: what is known of it, where IPython would look for a variable."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.magics.desk import Desk

_MAGIC = re.compile(r"\s*(?:[\w., ]+=\s*)?%%?flex\w+\s")
_INDEXED = re.compile(r"[\w.)\]]\[[\"'][^\"']*$")
_BEFORE, _AFTER = re.compile(r"[\w.*:{},\[\]]*$"), re.compile(r"[\w.*:{}\[\]]*")


class Inspection:
    """A kernel's answer to a question about a name, with sites among the names; a terminal has no kernel."""

    def __init__(self, shell: InteractiveShell, desk: Desk) -> None:
        self._kernel: Any = getattr(shell, "kernel", None)
        self._desk = desk

    def add(self) -> None:
        """Have the kernel ask here first."""
        if self._kernel is not None:
            self._kernel.do_inspect = self._do_inspect

    def remove(self) -> None:
        """Leave the kernel as it was."""
        if self._kernel is not None:
            del self._kernel.do_inspect

    def _do_inspect(self, code: str, cursor_pos: int, *args: Any, **kwargs: Any) -> Any:
        """The kernel's own method, for what stands in a line of ours or between an index's quotes."""
        site = site_at(code, cursor_pos)
        card = self._desk.session.known.card(site) if site and self._desk.has_session else None
        if card is None:
            return type(self._kernel).do_inspect(self._kernel, code, cursor_pos, *args, **kwargs)
        return {"status": "ok", "found": True, "data": {"text/plain": card}, "metadata": {}}


def site_at(code: str, position: int) -> str:
    """The word of a magic's line, or of an index as in ``run["…"]``, around a cursor; else ``""``."""
    start = code.rfind("\n", 0, position) + 1
    before, after = code[start:position], code[position:].partition("\n")[0]
    if _MAGIC.match(before) is None and _INDEXED.search(before) is None:
        return ""
    left, right = _BEFORE.search(before), _AFTER.match(after)
    assert left is not None  # it may be empty
    assert right is not None
    return (left[0] + right[0]).strip("[]:")
