"""Hooks of people whose code an engine does not trust: each guest's run in a process of its own, walled in.

The process has no network, no files, no environment and no model, only the tensor of the site, in memory
shared with the engine, and bounded memory and time. Endless code, a crash or a flood of memory ends the
box and is an error of the hook, as any other. It stops mistakes and ordinary abuse; it is no proof
against a flaw of the kernel.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from flexmagic.engine.box_walls import Room, available
from flexmagic.engine.box_words import ALIGNED, DTYPES, BoxError, Placed, hear, send
from flexmagic.engine.code import HookSource, ToldError
from flexmagic.errors import HookError

START = 120.0
"""Seconds that the template may take to be there: it imports torch."""


ENVIRONMENT = {
    "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip
"""All of a box's environment: libraries must not begin threads, which it could not have."""


class BoxedError(ToldError):
    """What a guest's hook raised in its box, or why there is no box any more."""


class Boxes:
    """An engine's boxes, one for each guest who needs one. ``room``: what each may take."""

    def __init__(self, room: Room | None = None) -> None:
        self.room = room or Room()
        self._template: _Template | None = None
        self._boxes: dict[str, Box] = {}

    def begin(self) -> None:
        """Begin with what boxes are made of, which takes seconds, so that no hook waits for it."""
        if not available():
            self._start()

    def hook(self, source: HookSource) -> Callable[[dict[str, Any]], Any]:
        """A hook that runs in its owner's box; raises :class:`HookError` where there can be none for it."""
        if reason := available():
            raise HookError(
                f"Hook {source.name!r} cannot run here, where nobody's code is trusted: {reason}."
            )
        if source.function is not None:
            raise HookError("Only the text of a hook can go into a box, not a function. Write it as a cell.")
        if source.limits.when:
            raise HookError(
                "A condition is code, too, and a guest's code runs in a box only. Leave out --when."
            )
        self._start()  # it takes seconds, and may be there when the hook first runs
        return lambda names: self._of(source.owner).call(source, names)

    def _start(self) -> _Template:
        if self._template is None or self._template.ended:
            self._template = _Template()
        return self._template

    def _of(self, owner: str) -> Box:
        box = self._boxes.get(owner)
        if box is None or box.ended:
            box = self._boxes[owner] = Box(self._start(), self.room)
        return box

    def end(self, owner: str | None = None) -> None:
        """End a guest's box, or all."""
        for name in list(self._boxes) if owner is None else [owner]:
            if (box := self._boxes.pop(name, None)) is not None:
                box.end()
        if owner is None and self._template is not None:
            self._template.end()
            self._template = None


class _Template:
    """The process that is copied; see :mod:`flexmagic.engine.box_start`."""

    def __init__(self) -> None:
        self._link, its = socket.socketpair()
        start = "import sys; sys.path[:] = __import__('json').loads(sys.argv[2]); "
        start += "from flexmagic.engine.box_start import main; main(int(sys.argv[1]))"
        with its:
            self._process = subprocess.Popen(  # noqa: S603 - this Python, with a text of ours
                [sys.executable, "-I", "-c", start, str(its.fileno()), json.dumps(sys.path)],
                pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, cwd="/", env=ENVIRONMENT, start_new_session=True,
            )  # fmt: skip
        self._link.settimeout(START)
        self._ready = False

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def copied(self, link: socket.socket, memory: int, room: Room) -> int:
        """A new box that answers on a socket and sees some memory; its process id."""
        if not self._ready:
            if self._link.recv(64) != b"ready":
                raise BoxedError("RuntimeError", "no box could be made: its template ended at once")
            self._ready = True
        socket.send_fds(self._link, [json.dumps(asdict(room)).encode()], [link.fileno(), memory])
        return int(self._link.recv(64))

    def end(self) -> None:
        self._link.close()
        self._process.kill()
        self._process.wait()


class Box:
    """One guest's process, and the memory that it shares with this one."""

    def __init__(self, template: _Template, room: Room) -> None:
        self._template, self._room = template, room
        self._link: socket.socket | None = None
        self._process = -1
        self._size = 0
        self._known: set[str] = set()
        self._context: Any = None
        self._runs = 0
        self.ended = False

    def call(self, source: HookSource, names: Mapping[str, Any]) -> torch.Tensor:
        """What a hook leaves of ``x``: the same tensor if it changed nothing. What it saved is in ``ctx``.

        Raises :class:`BoxedError`.
        """
        x: torch.Tensor = names["x"]
        if x.requires_grad:
            raise BoxedError(
                "RuntimeError", "gradients do not pass through a guest's code: use hooks without code"
            )
        if _name(x.dtype) not in DTYPES:
            raise BoxedError("TypeError", f"{_name(x.dtype)} cannot be given to a box")
        lies = Placed(0, tuple(x.shape), x.dtype)
        self._make_room(lies.nbytes + ALIGNED)
        lies.view(self._memory).copy_(x)
        if names["ctx"] is not self._context:  # each run has one of its own
            self._context, self._runs = names["ctx"], self._runs + 1
        said = {
            "hook": f"{source.name} {source.version}", "shape": list(x.shape), "dtype": _name(x.dtype),
            "run": self._runs, "seed": torch.initial_seed() & 0xFFFFFFFF,
            **{name: names[name] for name in ("site", "index", "step", "rank")},
        }  # fmt: skip
        if said["hook"] not in self._known:
            said |= {"name": source.name, "version": source.version, "text": source.text}
            said["first_line"] = source.first_line
            self._known.add(said["hook"])
        answer = self._asked(said)
        sys.stdout.write(answer["printed"])  # where the hook's own would go
        if "error" in answer:
            raise answer["error"]
        names["ctx"].update(answer["saved"])
        return lies.view(self._memory).to(x.device, copy=True) if answer["edited"] else x

    def _make_room(self, nbytes: int) -> None:
        """Have a process with so much memory for the hook's tensor, and for what it saves behind it."""
        if self._link is not None and nbytes + self._room.saved <= self._size:
            return
        self.end()
        self._size = (1 << max(20, math.ceil(math.log2(nbytes)))) + self._room.saved
        memory = os.memfd_create("flexmagic box", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, self._size)
            self._link, its = socket.socketpair()
            with its:
                room = Room(**{**asdict(self._room), "memory": self._room.memory + 2 * self._size})
                self._process = os.pidfd_open(self._template.copied(its, memory, room))
            self._map = mmap.mmap(memory, self._size)
        finally:
            os.close(memory)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._known.clear()
        self.ended = False
        if self._heard(START) != "ready":
            self._fail("the system made no walls for it")

    def _asked(self, said: dict[str, Any]) -> dict[str, Any]:
        assert self._link is not None  # _make_room() made it
        try:
            send(self._link, said)
            return self._checked(self._heard(self._room.seconds))
        except OSError:
            self._fail("it had ended")
        except BoxError as error:
            self._fail(str(error))
        except BaseException:  # an interrupt: the answer is still to come, and nobody will hear it
            self.end()
            raise

    def _heard(self, seconds: float) -> Any:
        assert self._link is not None
        self._link.settimeout(seconds)
        until = time.monotonic() + seconds
        if not select.select([self._link], [], [], max(until - time.monotonic(), 0))[0]:
            self._fail(f"it took longer than {seconds:g} s: a loop without end?", "TimeoutError")
        try:
            return hear(self._link)
        except EOFError:
            memory = f"{self._room.memory >> 20} MB"
            self._fail(f"its process ended: did it take more than {memory} of memory, or crash?")
        except TimeoutError:
            self._fail("it began an answer and did not end it", "TimeoutError")
        except (BoxError, OSError) as error:
            self._fail(str(error))

    def _checked(self, answer: Any) -> dict[str, Any]:
        """What a box said, if it is what a box may say; raises :class:`BoxError`."""
        if not isinstance(answer, dict) or not isinstance(answer.get("printed"), str):
            raise BoxError("its answer was none")
        if "error" in answer:
            return {"printed": answer["printed"], "error": _error(answer["error"])}
        if not isinstance(answer.get("edited"), bool) or not isinstance(answer.get("saved"), dict):
            raise BoxError("its answer was none")
        saved = {str(name): self._value(value) for name, value in answer["saved"].items()}
        return {"printed": answer["printed"], "edited": answer["edited"], "saved": saved}

    def _value(self, said: Any) -> Any:
        if isinstance(said, dict) and "tensor" in said:
            return Placed.checked(said["tensor"], self._size).view(self._memory).clone()
        if not isinstance(said, dict) or "value" not in said:
            raise BoxError("it saved what is no value")
        return said["value"]

    def _fail(self, reason: str, kind: str = "BoxError") -> NoReturn:
        self.end()
        raise BoxedError(kind, f"the box of this hook was ended: {reason}")

    def end(self) -> None:
        """End the process; what it shared goes when nobody looks at it any more."""
        self.ended = True
        if self._process >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            os.close(self._process)
            self._process = -1
        if self._link is not None:
            self._link.close()
            self._link = None


def _error(said: Any) -> BoxedError:
    if not isinstance(said, dict):
        raise BoxError("its error was none")
    kind, message, trace = (said.get(name) for name in ("kind", "message", "trace"))
    where = said.get("where")
    if not all(isinstance(text, str) for text in (kind, message, trace)) or not isinstance(where, list):
        raise BoxError("its error was none")
    if len(where) != 3 or any(type(n) is not int and n is not None for n in where):
        raise BoxError("its error was nowhere")
    return BoxedError(str(kind)[:100], str(message)[:4000], tuple(where), str(trace)[-8000:])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
