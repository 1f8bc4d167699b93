"""What runs in a box: one guest's hooks, one after the other, each on a tensor in shared memory."""

from __future__ import annotations

import contextlib
import io
import mmap
import random
import socket
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flexmagic.engine.box_walls import Room, close_in
from flexmagic.engine.box_words import DTYPES, BoxError, Placed, hear, placed, send
from flexmagic.engine.code import HookSource, build
from flexmagic.engine.tensors import check_result

PLAIN = (bool, int, float, str, type(None))


class Absent:
    """Stands for what there is outside of the box only."""

    def __init__(self, what: str) -> None:
        self.__dict__["what"] = what

    def _refuse(self, *_: Any) -> Any:
        what = self.__dict__["what"]
        raise RuntimeError(f"{what} cannot be had in a box: there is only x, and what hooks saved in ctx")

    __getattr__ = __setattr__ = __getitem__ = __setitem__ = __call__ = __iter__ = __len__ = _refuse


class Printed(io.TextIOBase):
    """Takes what is printed, up to so many characters."""

    def __init__(self, most: int) -> None:
        self._left, self._parts = most, list[str]()

    def write(self, text: str) -> int:
        """Keep it as far as there is room."""
        if self._left > 0:
            self._parts.append(text[: self._left])
            self._left -= len(text)
            if self._left <= 0:
                self._parts.append("\n(more was printed, and cut off)\n")
        return len(text)

    def text(self) -> str:
        """All of it."""
        return "".join(self._parts)


class Inside:
    """The box's own state: its hooks, their namespace, and what they saved in this run."""

    def __init__(self, room: Room, memory: mmap.mmap) -> None:
        self._room, self._map = room, memory
        self._namespace: dict[str, Any] = {"__name__": "box", "torch": torch, "np": np}
        self._hooks: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self._sources: dict[str, HookSource] = {}
        self._run, self._context = None, dict[str, Any]()

    def answer(self, said: dict[str, Any]) -> dict[str, Any]:
        """What one call of a hook gives."""
        key, printed = said["hook"], Printed(self._room.printed)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                if "text" in said:
                    source = HookSource(said["name"], said["version"], said["text"], None, said["first_line"])
                    self._sources[key], self._hooks[key] = source, build(source, self._namespace)
                found = self._called(said)
        except BaseException as error:  # noqa: BLE001 - also SystemExit: it is the guest's code
            found = {"error": _described(error, self._sources.get(key))}
        return {**found, "printed": printed.text()}

    def _called(self, said: dict[str, Any]) -> dict[str, Any]:
        memory = torch.frombuffer(self._map, dtype=torch.uint8)
        lies = Placed(0, tuple(said["shape"]), DTYPES[said["dtype"]])
        if said["run"] != self._run:
            self._run, self._context = said["run"], {}
        for generator in (torch.manual_seed, np.random.seed, random.seed):
            generator(said["seed"])
        x = lies.view(memory)
        before = x._version  # noqa: SLF001 - torch's documented counter
        names = {name: Absent(name) for name in ("module", "modules", "persistent")}
        names |= {name: said[name] for name in ("site", "index", "step", "rank")}
        left = self._hooks[said["hook"]]({"x": x, "ctx": self._context, **names})
        check_result(left, x.shape, x.dtype, x.device)
        edited = left is not x or x._version != before  # noqa: SLF001
        if left is not x:
            x.copy_(
                left.clone() if left.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else left
            )
        return {"edited": edited, "saved": self._saved(memory, lies.nbytes)}

    def _saved(self, memory: torch.Tensor, start: int) -> dict[str, Any]:
        """What is in ``ctx``: plain values as they are, tensors written behind the hook's own."""
        tensors = {k: v.detach() for k, v in self._context.items() if isinstance(v, torch.Tensor)}
        out: dict[str, Any] = {}
        for (name, tensor), place in zip(tensors.items(), placed(list(tensors.values()), start), strict=True):
            if place.start + place.nbytes - start > self._room.saved:
                raise ValueError(
                    f"ctx[{name!r}]: more than {self._room.saved >> 20} MB cannot be saved from a box"
                )
            if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
                raise TypeError(f"ctx[{name!r}]: {tensor.dtype} cannot be saved from a box")
            place.view(memory).copy_(tensor)
            out[str(name)] = {"tensor": place.plain()}
        for name, value in self._context.items():
            if name not in tensors:
                _check_plain(name, value)
                out[str(name)] = {"value": value}
        return out


def _check_plain(name: str, value: Any) -> None:
    items = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, PLAIN) for item in items):
        raise TypeError(
            f"ctx[{name!r}]: a box saves tensors, numbers, texts and their lists, not {type(value).__name__}"
        )


def _described(error: BaseException, source: HookSource | None) -> dict[str, Any]:
    """An exception as plain values: its kind, message, the line of the guest's cell, and the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if source is not None and frame.filename == source.filename]
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, ImportError):
        error = ImportError(f"{error}. A box has torch, numpy and some of Python's own modules only")
    where = (own[-1].lineno, own[-1].colno, own[-1].end_colno) if own else (None, None, None)
    return {
        "kind": type(error).__name__,
        "message": str(error)[:4000],
        "where": where,
        "trace": trace[-8000:],
    }


REHEARSAL = """
import collections, functools, itertools, math, operator, re, statistics, string
from torch.nn import functional

y = torch.randn(4, 4) @ x.float().T[:4, :4]
functional.softmax(y, -1), functional.gelu(y), functional.layer_norm(y, (4,))
functional.cosine_similarity(y, y), torch.einsum("ij,jk->ik", y, y)
torch.linalg.svd(y), torch.linalg.qr(y), torch.linalg.norm(y), torch.fft.fft(y)
y.topk(2), y.sort(), y.unique(), y.bfloat16() @ y.bfloat16(), y.median(), y.quantile(0.5), y.argmax(-1)
print(y, y.numpy(), y[0, 0].item())
np.linalg.norm(y.numpy()), np.random.rand(3), np.fft.fft(y.numpy())
ctx["y"], ctx["n"] = y, 1
x = x * 2
if step:
    undefined
"""


def rehearse() -> None:
    """Have libraries read and set up what they do at a first use: in a box they could not."""
    inside = Inside(Room(), mmap.mmap(-1, 1 << 25))
    said = {"hook": "h", "name": "h", "version": 1, "text": REHEARSAL, "first_line": 1, "run": 1, "seed": 0}
    said |= {"shape": [4, 4], "dtype": "float32", "site": "a", "index": 0, "rank": 0}
    for step, wanted in ((0, "saved"), (1, "error")):
        found = inside.answer({**said, "step": step})
        if wanted not in found:
            raise RuntimeError(f"a box would not work here: {found}")


def live(link: socket.socket, memory: int, room: Room) -> None:
    """Close the box around this process, and answer until nobody asks any more."""
    mapped = mmap.mmap(memory, 0)
    inside = Inside(room, mapped)
    close_in(room)
    send(link, "ready")
    with contextlib.suppress(EOFError, OSError, BoxError):
        while True:
            send(link, inside.answer(hear(link)))
