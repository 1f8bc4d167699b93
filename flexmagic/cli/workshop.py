"""`flexmagic workshop serve`: a gateway to a running cluster, until it is interrupted; `close` ends it."""

from __future__ import annotations

import signal
import threading


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
    """Open a workshop, say how to join, and every ``every`` seconds how it is, if that has changed."""
    from flexmagic.workshop.hub import Hub
    from flexmagic.workshop.opening import announcement, open_workshop

    server = open_workshop(
        profile, guests=guests, limits=limits, host=host, port=port, trusted=trusted, together=together,
        journal=log, hub=Hub() if hub else None,
    )  # fmt: skip
    ended = threading.Event()
    try:
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        print(announcement(server), flush=True)
        print("Interrupt to stop: started again, it goes on with its guests.", flush=True)
        said = ""
        while not ended.wait(every):
            now = str(server.workshop.status())
            if now != said:
                print(f"\n{now}", flush=True)
                said = now
    except KeyboardInterrupt:
        pass
    finally:
        server.close(for_good=False)
    print(
        "The gateway has stopped. `flexmagic workshop serve` goes on with its guests; "
        "`flexmagic workshop close` ends the workshop for good.",
        flush=True,
    )


def close(*, profile: str | None) -> None:
    """End a workshop for good whose gateway has stopped."""
    from flexmagic.workshop.opening import end_workshop

    print(end_workshop(profile), flush=True)
