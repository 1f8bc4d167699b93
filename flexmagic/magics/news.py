"""What the owner of a workshop has put up, said once in a guest's notebook after the next of its cells."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from flexmagic.errors import FlexError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.magics.desk import Desk

LINE = 1200
"""Characters of the longest line."""


class News:
    """Says in a line each what is new, once an answer has told that there is something; asks nobody else."""

    def __init__(self, shell: InteractiveShell, desk: Desk) -> None:
        self._shell, self._desk = shell, desk

    def add(self) -> None:
        """Listen to the end of each cell."""
        self._shell.events.register("post_run_cell", self._say)

    def remove(self) -> None:
        """Listen no more."""
        with contextlib.suppress(ValueError):
            self._shell.events.unregister("post_run_cell", self._say)

    def _say(self, _result: Any) -> None:
        guest = self._desk.guest
        if guest is None:
            return
        from flexmagic.view.words import visible

        with contextlib.suppress(FlexError):  # the cell has said what is wrong, or the next one will
            for notice in guest.notices.new():
                print(visible(notice.line, LINE))
