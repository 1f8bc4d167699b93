"""The worlds of guests: made when they are needed, found again on the engines, and left empty."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from flexmagic.client.tenant import Host, Tenant
from flexmagic.errors import FlexError

if TYPE_CHECKING:
    from flexmagic.workshop.guests import Guest, Guests

LOST = "The engines were started anew meanwhile: your hooks and runs are gone."

SAID = 200_000
"""Characters of what hooks have printed that are kept until a run takes them along."""


class Worlds:
    """What guests have on the engines of one host; ``trusted``: their code runs in no boxes."""

    def __init__(self, host: Host, guests: Guests, *, trusted: bool) -> None:
        self._host, self._guests, self._trusted = host, guests, trusted
        host.again = self._again

    def enter(self, guest: Guest) -> bool:
        """See that a guest has a world; whether it is a new one."""
        if guest.tenant is not None:
            return False

        def say(text: str) -> None:
            if sum(map(len, guest.said)) < SAID:  # runs that fail take nothing of it along
                guest.said.append(text[:SAID])

        guest.tenant = Tenant(self._host, say, boxed=not self._trusted, owner=guest.world)
        guest.world = guest.tenant.owner
        if guest.notice:  # who has not joined again hears of it with the next run
            guest.said.append(f"Note: {guest.notice}\n")
            guest.notice = ""
        return True

    def find(self, engines: list[int] | None) -> None:
        """Find what a gateway before this one left on its ``engines``, of all guests."""
        for guest in self._guests:
            if guest.world:
                self.enter(guest)
                assert guest.tenant is not None  # just made
                guest.runs.update(sorted(guest.tenant.found.items()))
                if guest.held and not len(guest.tenant.hooks) and not guest.runs:
                    guest.notice = LOST
        if engines != self._host.calls.ranks.pids:
            self._again()

    def _again(self) -> None:
        """Engines were replaced: give them again what guests have."""
        if not self._trusted:
            self._host.begin_boxes()
        for guest in self._guests:
            if guest.tenant is not None:
                guest.tenant.again(list(guest.runs.values()))

    @staticmethod
    def leave(guest: Guest) -> None:
        """Leave nothing of a guest's on the engines."""
        tenant, guest.tenant, guest.world = guest.tenant, None, ""
        runs = list(guest.runs.values())
        guest.runs.clear()
        guest.looked.clear()
        if tenant is not None:
            with contextlib.suppress(FlexError):
                tenant.leave(runs)
