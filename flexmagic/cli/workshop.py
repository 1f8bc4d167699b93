"""`flexmagic workshop serve`: a gateway to a running cluster, until it is interrupted; `close` ends it."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING

from flexmagic.errors import ClusterError

if TYPE_CHECKING:
    from flexmagic.workshop.gateway import Workshop

LOOK = 1.0
"""Seconds between two looks at whether the cluster is still there."""

FAREWELL = 5.0
"""Seconds for which guests are still told that it is not; notebooks ask every four."""


def serve(
    *,
    profile: str | None,
    guests: int,
    limits: str,
    host: str,
    port: int,
    trusted: bool,
    together: int,
    log: str | None,
    every: float,
    hub: bool,
) -> None:
    """Open a workshop, say how to join, and every ``every`` seconds how it is, if that has changed.

    Until it is interrupted; raises :class:`ClusterError` once its cluster has ended.
    """
    from flexmagic.workshop.hub import Hub
    from flexmagic.workshop.opening import announcement, open_workshop

    server = open_workshop(
        profile, guests=guests, limits=limits, host=host, port=port, trusted=trusted, together=together,
        journal=log, hub=Hub() if hub else None,
    )  # fmt: skip
    ended = threading.Event()
    over = False
    try:
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        print(announcement(server), flush=True)
        print("Interrupt to stop: started again, it goes on with its guests.", flush=True)
        over = _is_over(server.workshop, ended, every)
        if over:
            ended.wait(FAREWELL)
    except KeyboardInterrupt:
        pass
    finally:
        server.close(for_good=False)
    if over:
        raise ClusterError(
            f"The workshop is over: its cluster {server.workshop.name} has ended. Guests who asked were told."
        )
    print(
        "\nThe gateway has stopped. `flexmagic workshop serve` goes on with its guests; "
        "`flexmagic workshop close` ends the workshop for good.",
        flush=True,
    )


def _is_over(workshop: Workshop, ended: threading.Event, every: float) -> bool:
    """Say how a workshop is until it is ``ended``, or until its cluster is: whether that was it."""
    said, due = "", 0.0
    while not ended.wait(min(LOOK, every)):
        if workshop.is_over:
            return True
        if time.monotonic() >= due:
            due = time.monotonic() + every
            now = str(workshop.status())
            if now != said:
                print(f"\n{now}", flush=True)
                said = now
    return False


def close(*, profile: str | None) -> None:
    """End a workshop for good whose gateway has stopped."""
    from flexmagic.workshop.opening import end_workshop

    print(end_workshop(profile), flush=True)
