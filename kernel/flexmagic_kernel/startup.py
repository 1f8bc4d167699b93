"""What a kernel does at its start, if its settings ask for it: have a cluster, and load its model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmagic.magics import desk_of

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic import Session
    from flexmagic.magics.settings import FlexMagic


def begin(shell: InteractiveShell) -> None:
    """Start or attach to the cluster of the settings, in the background; the first cell is not waited for."""
    desk = desk_of(shell)
    settings = desk.settings
    if not settings.background or desk.has_session:
        return
    cluster = (
        f"Attaching to {settings.profile}" if settings.profile else f"Starting {settings.engines} engines"
    )
    model = f" and loading {settings.model}" if settings.model else ""
    desk.expect(cluster + model, lambda: _session(settings))


def _session(settings: FlexMagic) -> Session:
    """The session that the settings describe, its model loaded unless the cluster holds one."""
    from flexmagic import FlexError, ModelError, Session
    from flexmagic.magics.model import load

    if settings.profile:
        session = Session.attach(settings.profile)
    else:
        session = Session.start(settings.engines, keep=settings.keep, oversubscribe=settings.oversubscribe)
    if not settings.model:
        return session
    try:
        _ = session.model
    except ModelError:
        try:
            load(session, settings.model, settings.model_options)
        except FlexError:
            session.leave()
            raise
    return session
