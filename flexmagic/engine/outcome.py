"""What one rank reports of a run, as plain data."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from flexmagic.engine.screen import Bundle, Screen
from flexmagic.errors import RankFailure
from flexmagic.layout.sites import Site


@dataclass(frozen=True)
class Edit:
    """One body that ran: whether it changed its tensor, and exact sums over what it left.

    ``local``: it had the rank's own piece, so that ranks may differ. ``ran``: its condition held and
    there was something for it to act on.
    """

    site: str
    hook: str
    edited: bool
    sums: tuple[int, int] = (0, 0)
    local: bool = False
    ran: bool = True


@dataclass
class Outcome:
    """What one rank reports of a run: plain data.

    ``printed``: by site and hook, with lines that stand for what is in ``shown``. ``seconds``: in the
    bodies of each hook.
    """

    failures: list[RankFailure] = field(default_factory=list)
    stopped: str = ""
    edits: list[Edit] = field(default_factory=list)
    printed: list[tuple[str, str, str]] = field(default_factory=list)
    shown: dict[int, Bundle] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    calls: Counter[Site] = field(default_factory=Counter)
    loss_failures: tuple[str, ...] = ()
    refused: dict[Site, str] = field(default_factory=dict)

    def note(self, site: str, hook: str, screen: Screen) -> None:
        """Keep what a hook printed and displayed at a site, if it did."""
        if text := screen.getvalue():
            self.printed.append((site, hook, text))
            self.shown |= screen.shown

    @contextlib.contextmanager
    def timing(self, hook: str) -> Iterator[None]:
        """Count the seconds of a block as the hook's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[hook] = self.seconds.get(hook, 0.0) + time.perf_counter() - started
