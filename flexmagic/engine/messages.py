"""Tensors from one pipeline stage to the next: a header of fixed size says what follows, if anything."""

from __future__ import annotations

import contextlib
import enum
import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from flexmagic.engine.tensors import as_bytes
from flexmagic.errors import ModelError

MOST_TENSORS = 16
_MAX_DIMS = 8
_PER_TENSOR = 2 + _MAX_DIMS


class Instead(enum.IntEnum):
    """What comes instead of tensors: the sender failed, or the run ended before it got there."""

    FAILED = -1
    ENDED = -2


_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
"""A dtype travels as its place here; all ranks run the same torch."""


def check(tensors: Sequence[torch.Tensor]) -> None:
    """Raise :class:`ModelError` for more tensors or dims than a header holds."""
    if len(tensors) > MOST_TENSORS or any(t.ndim > _MAX_DIMS for t in tensors):
        msg = f"a pipeline stage may return {MOST_TENSORS} tensors of {_MAX_DIMS} dims at most"
        raise ModelError(msg)


def header(tensors: Sequence[torch.Tensor] | Instead) -> torch.Tensor:
    """Number, dtypes and shapes of checked tensors, int64, or what comes instead of them."""
    out = torch.zeros(1 + MOST_TENSORS * _PER_TENSOR, dtype=torch.int64)
    if isinstance(tensors, Instead):
        out[0] = tensors
        return out
    out[0] = len(tensors)
    for n, tensor in enumerate(tensors):
        words = [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
        out[1 + n * _PER_TENSOR : 1 + n * _PER_TENSOR + len(words)] = torch.tensor(words)
    return out


def empty(words: torch.Tensor, device: torch.device) -> list[torch.Tensor] | Instead:
    """Room for what a header announces, or what comes instead."""
    if int(words[0]) < 0:
        return Instead(int(words[0]))
    out = []
    for n in range(int(words[0])):
        dtype, ndim, *sizes = (int(w) for w in words[1 + n * _PER_TENSOR : 1 + (n + 1) * _PER_TENSOR])
        out.append(torch.empty(sizes[:ndim], dtype=_DTYPES[dtype], device=device))
    return out


def send(
    group: dist.ProcessGroup, to: int, tensors: Sequence[torch.Tensor] | Instead, device: torch.device
) -> list[Any]:
    """Start sending to a rank of the group; the works must be waited for, and keep their tensors alive."""
    payload = [] if isinstance(tensors, Instead) else [t.detach().contiguous() for t in tensors]
    outgoing = [header(tensors).to(device), *(as_bytes(t) for t in payload if t.numel())]
    return [_Sent(dist.isend(t, group=group, group_dst=to), t) for t in outgoing]


def receive(group: dist.ProcessGroup, source: int, device: torch.device) -> list[torch.Tensor] | Instead:
    """What a rank of the group sends."""
    words = header(()).to(device)
    dist.recv(words, group=group, group_src=source)
    tensors = empty(words.cpu(), device)
    for tensor in () if isinstance(tensors, Instead) else tensors:
        if tensor.numel():
            dist.recv(as_bytes(tensor), group=group, group_src=source)
    return tensors


def packed(
    values: Mapping[str, Any], attached: list[torch.Tensor] | None = None, *, beside_it: int = 0
) -> torch.Tensor:
    """Values by name, as what hooks saved, uint8; those that cannot be pickled stay where they are.

    ``attached``: takes the tensors in it that are part of a graph, and so many others, for which it is
    less work; they travel right before it.
    """
    kept, beside = {}, list[torch.Tensor]()
    for name, value in values.items():
        with contextlib.suppress(Exception):  # any class may define any __reduce__
            out, there = io.BytesIO(), list(beside)
            (pickle.Pickler(out) if attached is None else _Pickler(out, there, beside_it)).dump(value)
            kept[name], beside = out.getvalue(), there
    if attached is not None:
        attached += beside
    return torch.frombuffer(bytearray(pickle.dumps((kept, len(beside)))), dtype=torch.uint8)


def unpacked(tensors: Sequence[torch.Tensor]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What the stages before saved, out of the end of a message, and the tensors before that."""
    *rest, message = tensors
    kept, count = pickle.loads(message.cpu().numpy().tobytes())  # noqa: S301 - our own ranks' bytes
    first = len(rest) - count
    values = {name: _Unpickler(io.BytesIO(value), rest[first:]).load() for name, value in kept.items()}
    return values, rest[:first]


class _Pickler(pickle.Pickler):
    """Keeps tensors that are part of a graph, and any while there is room, and writes numbers for them."""

    def __init__(self, out: io.BytesIO, attached: list[torch.Tensor], room: int) -> None:
        super().__init__(out)
        self._attached, self._room = attached, room

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor) or not (obj.requires_grad or len(self._attached) < self._room):
            return None
        self._attached.append(obj)
        return len(self._attached) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: io.BytesIO, attached: Sequence[torch.Tensor]) -> None:
        super().__init__(data)
        self._attached = attached

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self._attached[pid]


class _Sent:
    """A send under way, and the memory it reads from."""

    def __init__(self, work: Any, tensor: torch.Tensor) -> None:
        self._work, self._tensor = work, tensor

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
