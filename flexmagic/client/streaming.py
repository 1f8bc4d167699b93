"""What ranks print and display while they run, shown at once where all of them have the same."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from flexmagic.client.displays import displayed
from flexmagic.client.waiting import Progress, Waited

if TYPE_CHECKING:
    from flexmagic.engine.screen import Bundle

Displayed = Mapping[int, "Bundle"]
"""What a rank has displayed, by the number with which it stands in its text."""

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_MARK = "\x1e"


class Streaming:
    """Shows what the code of ranks prints, and what they write otherwise, as handlers of logging do.

    Lines are shown as soon as every rank has them, and the rest at the end, by rank if it differs.
    """

    def __init__(
        self,
        printer: Callable[[str], None],
        world_size: int,
        display: Callable[[Bundle], None] = displayed,
    ) -> None:
        self._code = _Lines(printer, display, world_size)
        self._aside = _Lines(printer, display, world_size)
        self._heard: Mapping[int, str] = {}

    def beside(self, progress: Progress | None) -> Progress | None:
        """The same progress, with what is printed shown in between; nothing if nobody listens."""
        if progress is None:
            return None

        def both(waited: Waited) -> None:
            self._code.hear(waited.printed, waited.shown)
            self._heard = waited.aside
            self._aside.hear(waited.aside, {})
            progress(waited)

        return both

    def end(self, texts: Sequence[str] = (), shown: Sequence[Displayed] = ()) -> None:
        """Show what is left of all that each rank has printed, where that is known; then begin anew."""
        self._code.end(texts, shown)
        if self._heard:
            self._aside.end([*self._heard.values()], [{}] * len(self._heard))
        self._heard = {}


class _Lines:
    """One text of each rank, as far as it is shown."""

    def __init__(
        self, printer: Callable[[str], None], display: Callable[[Bundle], None], world_size: int
    ) -> None:
        self._printer = printer
        self._display = display
        self._world_size = world_size
        self._done: list[str] = []

    def hear(self, texts: Mapping[int, str], shown: Mapping[int, Displayed]) -> None:
        """Take what ranks have printed so far, each from its beginning, in whole lines."""
        if len(texts) < self._world_size:
            return
        lines = _common([_LINE.findall(text) for text in texts.values()])
        if len(lines) > len(self._done) and [*map(_key, lines)][: len(self._done)] == self._done:
            self._show(lines[len(self._done) :], shown.get(next(iter(texts)), {}))
            self._done = [*map(_key, lines)]

    def end(self, texts: Sequence[str], shown: Sequence[Displayed]) -> None:
        """Take the whole of it."""
        by_rank = [_LINE.findall(text) for text in texts]
        done, self._done = self._done, []
        if all([*map(_key, lines[: len(done)])] == done for lines in by_rank):
            by_rank = [lines[len(done) :] for lines in by_rank]
        common = _common(by_rank)
        if common:
            self._show(common, shown[0])
        for rank, (lines, own) in enumerate(zip(by_rank, shown, strict=True)):
            for line in lines[len(common) :]:
                self._show([line], own, f"[rank {rank}] ")

    def _show(self, lines: Iterable[str], shown: Displayed, label: str = "") -> None:
        from flexmagic.engine.screen import marked

        for number, some in itertools.groupby(lines, marked):
            if number is None or number not in shown:
                self._printer(label + "".join(some).rstrip("\n"))
                continue
            if label:
                self._printer(label.rstrip())
            self._display(shown[number])


def _common(by_rank: Sequence[Sequence[str]]) -> list[str]:
    """The lines with which all ranks begin, as the first of them has them."""
    abreast = zip(*by_rank, strict=False)
    return [line[0] for line in itertools.takewhile(lambda of: len(set(map(_key, of))) == 1, abreast)]


def _key(line: str) -> str:
    """What is the same for lines that say the same."""
    from flexmagic.engine.screen import alike

    return _MARK + line.split(maxsplit=1)[-1] if line.startswith(_MARK) else alike(line.rstrip("\n"))
