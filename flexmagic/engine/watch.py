"""Where a rank is, told from another thread while its main thread works or waits.

Nothing is recorded while the model runs: the main thread's Python stack says what it is doing, even
while it is blocked in C++, and Linux says how much the thread and its connections have done.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from flexmagic.engine import sockets
from flexmagic.engine.slot import Slot
from flexmagic.engine.sockets import Endpoint

IDLE, USER, MEETING, MODEL, OTHER = "idle", "user code", "meeting", "model", "other code"
"""What a rank can be doing: nothing; the user's hook; waiting for other ranks; the model; something else."""

BACKWARD = "the backward"
"""Where a rank is between its modules once there is a loss."""

_TORCH = f"{os.sep}torch{os.sep}"
_OURS = str(Path(__file__).parent)
_EXCHANGES = (f"{_OURS}{os.sep}exchange.py", f"{_OURS}{os.sep}messages.py")
_MEETINGS = f"{_TORCH}distributed{os.sep}"
_BACKWARD = f"{_TORCH}autograd{os.sep}"
_LIBRARIES = ("site-packages", f"{os.sep}lib{os.sep}python", "<frozen ", _OURS)
_STANDARD = str(Path(os.__file__).parent)
_LOCKS = {"x86_64": {"202"}, "aarch64": {"98"}}.get(os.uname().machine, set())
"""The number of the system call in which a thread waits for a lock."""
_WAITS = _LOCKS | {
    "x86_64": {"7", "23", "35", "45", "47", "230", "232", "270", "271", "281"},
    "aarch64": {"22", "72", "73", "101", "115", "207", "212"},
}.get(os.uname().machine, set())
"""Those in which it waits for a lock, a socket or a time, and reads no file."""
_TICKS = os.sysconf("SC_CLK_TCK")

STIRRED, STIRRED_BESIDE = 0.001, 0.03
"""CPU seconds of the main thread, and of all others, from which on something has happened between two looks.

A thread that runs at all, if only to hand over the interpreter to who asks, takes more than the first;
threads that carry the questions and answers take less than the second.
"""


@dataclass(frozen=True)
class Whereabouts:
    """One look at a rank: plain data.

    ``kind``: one of the words above. ``what``: the verb, collective, or line that is being run.
    ``asleep``: the main thread sleeps, and reads no file. ``locked``: it does so in C++ until another
    thread wakes it, as in any collective; Python's own ways to wait are for threads and processes of this
    host. ``since``: seconds since the verb began. ``seconds``: CPU time of the main thread; ``beside``: of
    all others but the one that answers. ``moved``: bytes through its connections to other ranks.
    """

    kind: str
    what: str = ""
    site: str = ""
    hook: str = ""
    line: int | None = None
    text: str = ""
    asleep: bool = False
    locked: bool = False
    since: float = 0.0
    seconds: float = 0.0
    beside: float = 0.0
    moved: int = 0

    def __str__(self) -> str:
        """``in hook 'damp', line 3, at model.layers.2.mlp:output``."""
        at = f" at {self.site}" if self.site else ""
        if self.kind == IDLE:
            return "idle"
        if self.hook:
            line = f", line {self.line}" if self.line else ""
            waits = f" (waiting for other ranks in {self.what})" if self.kind == MEETING else ""
            return f"in hook {self.hook!r}{line},{at}{waits}"
        if self.kind == MEETING:
            return f"waiting for other ranks in {self.what}{at}"
        if self.kind == MODEL:
            return f"in the model{at}" if self.site else f"working on {self.what}"
        return f"in {self.what}"

    @property
    def blocked(self) -> bool:
        """Whether the rank waits for others: in a collective, or in a module on a lock."""
        return (self.kind == MEETING and self.asleep) or (
            self.kind == MODEL and bool(self.site) and self.locked
        )

    def as_at(self, before: Whereabouts) -> bool:
        """Whether nothing has happened between an earlier look and this one."""
        place, was = ((p.kind, p.what, p.site, p.hook, p.line, p.asleep, p.moved) for p in (self, before))
        return (
            place == was
            and self.seconds - before.seconds < STIRRED
            and self.beside - before.beside < STIRRED_BESIDE
        )

    def plain(self) -> dict[str, Any]:
        """As a dict of plain values."""
        return asdict(self)


def whereabouts(ranks: Collection[Endpoint] = ()) -> Whereabouts:
    """Where this process's main thread is; ``ranks``: the other ranks' ends of connections."""
    main = threading.main_thread()
    frame = sys._current_frames().get(main.ident or 0)  # noqa: SLF001 - the documented way to see other threads
    frames = list(_outwards(frame))
    port = Slot.runtime.groups.meeting.port if Slot.runtime is not None else 0
    moved = sockets.moved(ranks, port) if ranks else 0
    common: dict[str, Any] = {"moved": moved} | _thread(main, frames)
    working = Slot.working
    if not working:
        place = _other_code(frames)
        return Whereabouts(_kind(frames, OTHER), place, **common) if place else Whereabouts(IDLE, **common)
    common["since"] = time.monotonic() - Slot.began
    site, hook, line, text = _user_code(frames)
    if not site:
        site = _model_site(frames)
    kind = _kind(frames, USER if hook else MODEL)
    what = _collective(frames) if kind == MEETING else working
    return Whereabouts(kind, what, site, hook, line, text, **common)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _thread(thread: threading.Thread, frames: list[FrameType]) -> dict[str, Any]:
    """How a thread is, as Linux tells: whether it sleeps, on what, and what has been done."""
    task = Path(f"/proc/self/task/{thread.native_id}")
    try:
        call = (task / "syscall").read_text().split()[0]
    except OSError:  # not every container shows it
        call = ""
    asleep = (task / "stat").read_text().rpartition(")")[2].split()[0] == "S" and (not call or call in _WAITS)
    inside = frames[0].f_code.co_filename if frames else ""
    python = inside.startswith(_STANDARD) and "site-packages" not in inside
    return {
        "asleep": asleep,
        "locked": asleep and call in _LOCKS and not python,
        "seconds": time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0)),
        "beside": _beside(thread.native_id) if asleep else 0.0,
    }


def _beside(native_id: int | None) -> float:
    """CPU seconds of all threads but one and the one that asks."""
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) in {native_id, threading.get_native_id()}:
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def _kind(frames: list[FrameType], otherwise: str) -> str:
    """Whether the innermost frames, up to the first that is not a library's, wait for other ranks."""
    for frame in frames:
        name = frame.f_code.co_filename
        if _MEETINGS in name or name in _EXCHANGES:
            return MEETING
        if _TORCH not in name and "contextlib" not in name:
            return otherwise
    return otherwise


def _collective(frames: list[FrameType]) -> str:
    """The call in which ranks meet, by the name the caller used."""
    best = ""
    for frame in frames:
        code = frame.f_code
        if code.co_filename in _EXCHANGES:
            return "an exchange"
        if _TORCH not in code.co_filename:
            break
        if _MEETINGS not in code.co_filename:
            continue
        if code.co_name != "wrapper":
            best = code.co_name
            if code.co_filename.endswith("distributed_c10d.py"):
                break
    return best


def _user_code(frames: list[FrameType]) -> tuple[str, str, int | None, str]:
    """Site, hook, line and its text, if the user's hook is running."""
    for position, frame in enumerate(frames):
        if frame.f_code.co_name == "_guarded" and "hook" in frame.f_locals:
            source = frame.f_locals["hook"].source
            lines = [f.f_lineno for f in frames[:position] if f.f_code.co_filename == source.filename]
            line = lines[0] if lines else None
            text = source.line(line) if line else ""
            return str(frame.f_locals["site"]), source.name, line, text
        if frame.f_code.co_name == "gather" and frame.f_code.co_filename in _EXCHANGES:
            return str(frame.f_locals["rule"].site), "", None, ""
    return "", "", None, ""


def _model_site(frames: list[FrameType]) -> str:
    """The path of the innermost module that is being called; the model itself, and a wrapper, by its class.

    Without one, whether gradients are on their way back.
    """
    from flexmagic.engine.tree import modules_of

    if Slot.runtime is None or Slot.runtime.loaded is None:
        return ""
    called = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name == "_call_impl"]
    modules = [module for module in called if isinstance(module, nn.Module)]
    if not modules:
        return BACKWARD if any(_BACKWARD in frame.f_code.co_filename for frame in frames) else ""
    paths = {id(module): path for path, module in modules_of(Slot.runtime.loaded.model).items()}
    known = (paths[id(module)] or type(module).__name__ for module in modules if id(module) in paths)
    return next(known, type(modules[-1]).__name__)


def _other_code(frames: list[FrameType]) -> str:
    """The innermost line that is not a library's; ``""`` if there is none: the process waits for calls."""
    for frame in frames:
        name = frame.f_code.co_filename
        if not any(place in name for place in _LIBRARIES):
            return f"{Path(name).name}, line {frame.f_lineno}"
    return ""
