"""What user code prints: kept for the run's report, and told meanwhile if the run takes long."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator

EVERY = 0.25
"""Seconds between two tellings."""

MOST = 100_000
"""Characters of a run after which nothing more is told before it ends."""

Say = Callable[[str], None]
"""Hears all that has been printed so far, in whole lines."""


class Prints:
    """What the code of one run prints on this rank, to the standard output or the error output."""

    def __init__(self, say: Say = lambda _text: None) -> None:
        self._say = say
        self._text = ""
        self._told = time.monotonic()

    @contextlib.contextmanager
    def taken(self, buffer: io.StringIO) -> Iterator[None]:
        """Take what is printed in a block, into ``buffer`` too."""
        stream = _Stream(buffer, self._heard)
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            yield

    def _heard(self, text: str) -> None:
        if len(self._text) > MOST:
            return
        self._text += text
        now = time.monotonic()
        if "\n" in text and now - self._told > EVERY:
            self._told = now
            self._say(self._text[: self._text.rindex("\n") + 1])


class _Stream(io.TextIOBase):
    """Stands where code writes."""

    def __init__(self, buffer: io.StringIO, heard: Say) -> None:
        self._buffer, self._heard = buffer, heard

    def writable(self) -> bool:
        """Anything may be written."""
        return True

    def write(self, text: str) -> int:
        """Keep a text and tell it."""
        self._buffer.write(text)
        self._heard(text)
        return len(text)
