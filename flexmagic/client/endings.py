"""Telling whoever shows what ranks hold that their engines have ended, as soon as the controller says so."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexmagic.client.cluster import Cluster
    from flexmagic.view.source import Listener


class Endings:
    """What a session's views hear when engines end.

    Nothing runs until one does: the connection that is open anyway brings the word.
    """

    def __init__(self, cluster: Cluster, engines: Sequence[int]) -> None:
        self._cluster = cluster
        self._engines = engines
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._listening = False

    def tell(self, listener: Listener) -> None:
        """Call ``listener.ranks_ended`` from now on, for as long as it lives; twice is as once."""
        with self._lock:
            self._listeners.add(listener)
            if not self._listening:
                self._cluster.client._registration_callbacks.append(self._heard)  # noqa: SLF001 - no public way
                self._listening = True

    def _heard(self, event: Mapping[str, Any]) -> None:
        """Hear from the connection that an engine came or went; its thread may not wait for anybody."""
        if event["event"] == "unregister" and int(event["id"]) in self._engines:
            rank = self._engines.index(int(event["id"]))
            threading.Thread(target=self._pass_on, args=(rank,), name="flexmagic-ended", daemon=True).start()

    def _pass_on(self, rank: int) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            with contextlib.suppress(Exception):  # a page that is gone must not keep it from the others
                listener.ranks_ended((rank,))
