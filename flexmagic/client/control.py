"""Asking engines something while they are busy: over their control channel, which has a thread of its own.

The one place that hangs handlers into ipykernel and speaks ipyparallel's control messages.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.client.cluster import Cluster

if TYPE_CHECKING:
    from flexmagic.engine.sockets import Endpoint
    from flexmagic.engine.vitals import Vital
    from flexmagic.engine.watch import Whereabouts

LOOK, CUT, INTERRUPT, VITAL = "flexmagic_look", "flexmagic_cut", "flexmagic_interrupt", "flexmagic_vital"
MEMBERS = "flexmagic_members"

SOON = 1e-5
"""Seconds after which a busy main thread hands over to one that answers; many system calls make an answer."""


def install(kernel: Any) -> None:
    """Let an engine's kernel answer our questions on its control thread, whatever its main thread does."""
    for kind, answer in ANSWERS.items():
        kernel.control_handlers[kind] = _Handler(kernel, kind, answer)


@dataclass(frozen=True)
class _Handler:
    kernel: Any
    kind: str
    answer: Any

    def __call__(self, stream: Any, ident: Any, parent: Any) -> None:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(SOON)  # a loop in the main thread lets go of the interpreter at once when asked
        try:
            content = {"status": "ok", **self.answer(parent["content"])}
        except Exception as error:  # noqa: BLE001 - whoever asks must hear of anything
            content = {
                "status": "error",
                "ename": type(error).__name__,
                "evalue": str(error),
                "traceback": [],
            }
        finally:
            sys.setswitchinterval(usual)
        self.kernel.session.send(stream, f"{self.kind}_reply", content, parent=parent, ident=ident)


def _look(content: dict[str, Any]) -> dict[str, Any]:
    """Where the main thread is, and this end of the connections to the ranks whose ends are told."""
    from flexmagic.engine import sockets, watch

    ranks = {(host, port) for host, port in content["ranks"]}
    return {"place": watch.whereabouts(ranks).plain(), "endpoints": sockets.endpoints()}


def _ask_vital(_content: dict[str, Any]) -> dict[str, Any]:
    """Where the main thread is, and what the rank holds."""
    from flexmagic.engine import watch
    from flexmagic.engine.slot import Slot
    from flexmagic.engine.vitals import vital

    place = watch.whereabouts()
    runtime = Slot.runtime
    return {"place": place.plain(), "vital": None if runtime is None else asdict(vital(runtime))}


def _members(content: dict[str, Any]) -> dict[str, Any]:
    """What can follow a dotted name in a session's hook at a module."""
    from flexmagic.engine.members import members
    from flexmagic.engine.slot import Slot

    if Slot.runtime is None:
        return {"members": None}
    return {"members": members(Slot.runtime, content["owner"], content["path"], content["names"])}


def _cut(content: dict[str, Any]) -> dict[str, Any]:
    """Shut the connections to other ranks, so that nobody waits for them."""
    from flexmagic.engine import sockets
    from flexmagic.engine.groups import abort_device_groups
    from flexmagic.engine.slot import Slot

    if Slot.runtime is None:
        return {"shut": 0}
    abort_device_groups()
    ranks = {(host, port) for host, port in content["ranks"]}
    return {"shut": sockets.shut(ranks, Slot.runtime.groups.meeting.port)}


def _interrupt(_content: dict[str, Any]) -> dict[str, Any]:
    """Interrupt the main thread, if it is at work."""
    from flexmagic.engine import watch

    busy = watch.whereabouts().kind != watch.IDLE
    if busy:  # to the main thread itself, so that a sleep ends too
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    return {"sent": busy}


ANSWERS = {LOOK: _look, CUT: _cut, INTERRUPT: _interrupt, VITAL: _ask_vital, MEMBERS: _members}
"""The messages that engines answer beside Jupyter's and ipyparallel's own, as ``KIND_reply``."""


class Control:
    """The control channels of a cluster's engines, by rank."""

    def __init__(self, cluster: Cluster, engines: list[int]) -> None:
        self._cluster = cluster
        self._engines = engines
        self._endpoints: dict[int, tuple[Endpoint, ...]] = {}

    def look(self, ranks: Iterable[int], patience: float) -> dict[int, Whereabouts | None]:
        """Where ranks are; ``None`` for one that says nothing within ``patience`` seconds."""
        from flexmagic.engine.watch import Whereabouts

        said = self._ask(ranks, LOOK, {"ranks": self._ends()}, patience)
        for rank, content in said.items():
            if content is not None:
                self._endpoints[rank] = tuple((host, port) for host, port in content["endpoints"])
        return {rank: None if c is None else Whereabouts(**c["place"]) for rank, c in said.items()}

    def vitals(
        self, ranks: Iterable[int], patience: float
    ) -> dict[int, tuple[Whereabouts, Vital | None] | None]:
        """Where ranks are and how; ``None`` for one that says nothing within ``patience`` seconds."""
        from flexmagic.engine.vitals import Vital
        from flexmagic.engine.watch import Whereabouts

        said = self._ask(ranks, VITAL, {}, patience)
        return {
            rank: None
            if content is None
            else (Whereabouts(**content["place"]), Vital(**content["vital"]) if content["vital"] else None)
            for rank, content in said.items()
        }

    def members(
        self, ranks: Iterable[int], owner: str, path: str, names: Sequence[str], patience: float
    ) -> list[str] | None:
        """What can follow a dotted name in a session's hook at a module, by the first rank that knows."""
        asked = {"owner": owner, "path": path, "names": list(names)}
        said = self._ask(ranks, MEMBERS, asked, patience).values()
        return next((c["members"] for c in said if c is not None and c["members"] is not None), None)

    def cut(self, ranks: Collection[int], patience: float) -> None:
        """Shut the connections between ranks, so that none waits for another any more."""
        self.look(ranks, patience)  # every rank has to know the others' ends
        self._ask(ranks, CUT, {"ranks": self._ends()}, patience)

    def interrupt(self, ranks: Collection[int], patience: float) -> None:
        """Raise ``KeyboardInterrupt`` in the main threads of ranks that are at work."""
        self._ask(ranks, INTERRUPT, {}, patience)

    def _ends(self) -> list[Endpoint]:
        return sorted({end for ends in self._endpoints.values() for end in ends})

    def _ask(
        self, ranks: Iterable[int], kind: str, content: dict[str, Any], patience: float
    ) -> dict[int, dict[str, Any] | None]:
        pending: dict[int, Any] = {}
        said: dict[int, dict[str, Any] | None] = {}
        for rank in ranks:
            said[rank] = None
            with contextlib.suppress(Exception):  # an engine that is gone has no channel
                pending[rank] = self._cluster.client._send_control_request(  # noqa: SLF001 - see above
                    [self._engines[rank]], kind, content, block=False
                )
        deadline = time.perf_counter() + patience
        for rank, answer in pending.items():
            with contextlib.suppress(Exception):  # no answer in time, or the engine died meanwhile
                message = answer.result(max(deadline - time.perf_counter(), 0.001))
                message = message[0] if isinstance(message, list) else message
                if message["content"]["status"] == "ok":
                    said[rank] = message["content"]
        return said
