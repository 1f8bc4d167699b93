"""What ranks print while they run, shown at once where all of them have printed the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from flexmagic.client.waiting import Progress, Waited


class Streaming:
    """Shows lines as soon as every rank has printed them, and the rest at the end, by rank if it differs."""

    def __init__(self, printer: Callable[[str], None], world_size: int) -> None:
        self._printer = printer
        self._world_size = world_size
        self._shown = ""

    def beside(self, progress: Progress | None) -> Progress | None:
        """The same progress, with what is printed shown in between; nothing if nobody listens."""
        if progress is None:
            return None

        def both(waited: Waited) -> None:
            self.hear(waited.printed)
            progress(waited)

        return both

    def hear(self, texts: Mapping[int, str]) -> None:
        """Take what ranks have printed so far, each from its beginning."""
        if len(texts) < self._world_size:
            return
        lines = zip(*(text.splitlines(keepends=True) for text in texts.values()), strict=False)
        same = "".join(line[0] for line in itertools.takewhile(lambda line: len(set(line)) == 1, lines))
        if len(same) > len(self._shown) and same.startswith(self._shown):
            self._printer(drawn(same[len(self._shown) :]))
            self._shown = same

    def end(self, texts: Sequence[str]) -> None:
        """Show what is left of all that each rank has printed; what is heard next begins anew."""
        shown, self._shown = self._shown, ""
        if all(text.startswith(shown) for text in texts):
            texts = [text[len(shown) :] for text in texts]
        if len(set(texts)) == 1:
            if texts[0]:
                self._printer(drawn(texts[0]))
            return
        for rank, text in enumerate(texts):
            for line in drawn(text).splitlines():
                self._printer(f"[rank {rank}] {line}")


def drawn(text: str) -> str:
    """What a terminal would show of a text in the end: a bar that was drawn over itself is shown once."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip("\n").split("\n"))
