"""What a kernel does at its start, if its settings ask for it: have a cluster, and load its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flexmagic.magics import desk_of
from flexmagic.magics.restart import kernel_name, left_for

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic import Session
    from flexmagic.client.waiting import Waited
    from flexmagic.magics.settings import FlexMagic


def begin(shell: InteractiveShell) -> None:
    """Start or attach to the cluster of the settings, in the background; the first cell is not waited for.

    What this kernel left when it restarted comes first.
    """
    desk = desk_of(shell)
    settings = desk.settings
    if not settings.background or desk.has_session:
        return
    running = next((offer.cluster for offer in left_for(shell)), settings.profile)
    what = (
        f"Attaching to {running}"
        if running
        else f"Starting {settings.engines} engine{'s' * (settings.engines > 1)}"
    )
    model = f" and loading {settings.model}" if settings.model else ""
    desk.expect(what + model, lambda say: _session(settings, running, kernel_name(shell), say))


def _session(settings: FlexMagic, running: str, kernel: str, say: Callable[[Waited | str], None]) -> Session:
    """The session that the settings describe, its model loaded unless the cluster holds one."""
    from flexmagic import FlexError, ModelError, Session
    from flexmagic.magics.model import load

    if running:
        session = Session.attach(running, kernel=kernel)
    else:
        session = Session.start(
            settings.engines,
            keep=settings.keep,
            oversubscribe=settings.oversubscribe,
            progress=lambda up, what: say(f"{up} up, {what}"),
        )
    if not settings.model:
        return session
    try:
        _ = session.model
    except ModelError:
        try:
            load(session, settings.model, settings.model_options, progress=say)
        except FlexError:
            session.leave()
            raise
    return session
