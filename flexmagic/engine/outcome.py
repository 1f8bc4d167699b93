"""What one rank reports of a run, as plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

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
    """What one rank reports of a run: plain data."""

    failures: list[RankFailure] = field(default_factory=list)
    stopped: str = ""
    edits: list[Edit] = field(default_factory=list)
    printed: list[tuple[str, str, str]] = field(default_factory=list)
    calls: Counter[Site] = field(default_factory=Counter)
    loss_failures: tuple[str, ...] = ()
    refused: dict[Site, str] = field(default_factory=dict)
