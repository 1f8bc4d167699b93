"""What code writes, as a terminal would show it in the end: bars that are drawn over themselves once.

What is displayed stands in the text as a line that only :func:`marked` understands.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MOVES = re.compile(r"(\n|\r|\x1b\[A)")
_MARK = re.compile(r"\x1e(\d+) \d+\x1e\n?")
_BAR = re.compile(r"^(?:(?P<what>.*?): *)?\d+%\|.*\| *(?P<done>\d+)/(?P<total>\d+) \[")
_TIMES = re.compile(r"(?<=\| )(?P<count>\S+/\S+ )\[[\d:?]+<[^,\]]*, *[^,\]]*")

Bar = tuple[str, int, int]
"""What a bar counts, how many are done, and out of how many."""


@dataclass(frozen=True)
class Bundle:
    """What is displayed, by MIME type; ``update``: in the place of what has its ``display_id``."""

    data: Mapping[str, Any]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    display_id: str = ""
    update: bool = False

    @property
    def nbytes(self) -> int:
        """About how many bytes it takes to send."""
        return sum(len(v) if isinstance(v, str) else len(repr(v)) for v in self.data.values())

    def mark(self, number: int) -> str:
        """The line that stands for it in a text; the same for what looks the same."""
        seen = {kind: value for kind, value in self.data.items() if kind != "text/plain"} or self.data
        return f"\x1e{number} {zlib.crc32(repr((seen, self.metadata, self.update)).encode())}\x1e\n"


class Screen:
    """A text under a cursor that goes back to the start of its line, and up."""

    def __init__(self) -> None:
        self._rows = [""]
        self._row = self._col = 0
        self._returned: set[int] = set()
        self.shown: dict[int, Bundle] = {}

    def write(self, text: str) -> None:
        """Write at the cursor, over what stands there."""
        for piece in _MOVES.split(text):
            if piece == "\n":
                self._row, self._col = self._row + 1, 0
                self._rows += [""] * (self._row == len(self._rows))
            elif piece == "\r":
                self._col = 0
                self._returned.add(self._row)
            elif piece == "\x1b[A":
                self._row = max(self._row - 1, 0)
            elif piece:
                row = self._rows[self._row].ljust(self._col)
                self._rows[self._row] = row[: self._col] + piece + row[self._col + len(piece) :]
                self._col += len(piece)

    def place(self, number: int, shown: Bundle) -> None:
        """Put something displayed on a line of its own."""
        if self._col:
            self.write("\n")
        self.shown[number] = shown
        self.write(shown.mark(number))

    def getvalue(self) -> str:
        """All of it; what bars were drawn over is gone, and so are the blanks that they leave."""
        return "\n".join(map(self._text, range(len(self._rows))))

    def settled(self) -> str:
        """The lines above the cursor that nothing is drawn over any more, as far as can be told."""
        out = []
        for number in range(self._row):
            row = self._text(number)
            bar = bar_in(row)
            if bar is not None and bar[1] < bar[2]:
                break
            out.append(f"{row}\n")
        return "".join(out)

    def bar(self) -> Bar | None:
        """The first bar that has not come to its end."""
        found = (bar_in(self._text(number)) for number in sorted(self._returned))
        return next((bar for bar in found if bar is not None and bar[1] < bar[2]), None)

    def _text(self, number: int) -> str:
        row = self._rows[number]
        return row.rstrip() if number in self._returned else row


def bar_in(line: str) -> Bar | None:
    """What a line says that is a bar of tqdm's."""
    found = _BAR.match(line)
    return None if found is None else (found["what"] or "", int(found["done"]), int(found["total"]))


def marked(line: str) -> int | None:
    """The number of what is displayed in the place of a line; ``None`` for a line of text."""
    found = _MARK.fullmatch(line)
    return None if found is None else int(found[1])


def alike(text: str) -> str:
    """A text without what differs between ranks that do the same: how fast their bars went."""
    return _TIMES.sub(r"\g<count>[", text)
