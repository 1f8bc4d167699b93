"""Tensors from one pipeline stage to the next: a header of fixed size says what follows, if anything."""

from __future__ import annotations

import contextlib
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
_FAILED = -1

_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
"""A dtype travels as its place here; all ranks run the same torch."""


def check(tensors: Sequence[torch.Tensor]) -> None:
    """Raise :class:`ModelError` for more tensors or dims than a header holds."""
    if len(tensors) > MOST_TENSORS or any(t.ndim > _MAX_DIMS for t in tensors):
        msg = f"a pipeline stage may return {MOST_TENSORS} tensors of {_MAX_DIMS} dims at most"
        raise ModelError(msg)


def header(tensors: Sequence[torch.Tensor] | None) -> torch.Tensor:
    """Number, dtypes and shapes of checked tensors, int64; ``None`` says that the sender failed."""
    out = torch.zeros(1 + MOST_TENSORS * _PER_TENSOR, dtype=torch.int64)
    out[0] = _FAILED if tensors is None else len(tensors)
    for n, tensor in enumerate(tensors or ()):
        words = [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
        out[1 + n * _PER_TENSOR : 1 + n * _PER_TENSOR + len(words)] = torch.tensor(words)
    return out


def empty(words: torch.Tensor, device: torch.device) -> list[torch.Tensor] | None:
    """Room for what a header announces; ``None`` if the sender failed."""
    if int(words[0]) == _FAILED:
        return None
    out = []
    for n in range(int(words[0])):
        dtype, ndim, *sizes = (int(w) for w in words[1 + n * _PER_TENSOR : 1 + (n + 1) * _PER_TENSOR])
        out.append(torch.empty(sizes[:ndim], dtype=_DTYPES[dtype], device=device))
    return out


def send(
    group: dist.ProcessGroup, to: int, tensors: Sequence[torch.Tensor] | None, device: torch.device
) -> list[Any]:
    """Start sending to a rank of the group; the works must be waited for, and keep their tensors alive."""
    payload = [] if tensors is None else [t.detach().contiguous() for t in tensors]
    outgoing = [header(tensors).to(device), *(as_bytes(t) for t in payload if t.numel())]
    return [_Sent(dist.isend(t, group=group, group_dst=to), t) for t in outgoing]


def receive(group: dist.ProcessGroup, source: int, device: torch.device) -> list[torch.Tensor] | None:
    """What a rank of the group sends; ``None`` if it failed."""
    words = header(()).to(device)
    dist.recv(words, group=group, group_src=source)
    tensors = empty(words.cpu(), device)
    for tensor in tensors or ():
        if tensor.numel():
            dist.recv(as_bytes(tensor), group=group, group_src=source)
    return tensors


def packed(values: Mapping[str, Any]) -> torch.Tensor:
    """What hooks saved, uint8; values that cannot be pickled stay where they are."""
    kept = {}
    for name, value in values.items():
        with contextlib.suppress(Exception):  # any class may define any __reduce__
            kept[name] = pickle.dumps(value)
    return torch.frombuffer(bytearray(pickle.dumps(kept)), dtype=torch.uint8)


def unpacked(message: torch.Tensor) -> dict[str, Any]:
    """What the stages before saved."""
    kept = pickle.loads(message.cpu().numpy().tobytes())  # noqa: S301 - our own ranks' bytes
    return {name: pickle.loads(value) for name, value in kept.items()}  # noqa: S301


class _Sent:
    """A send under way, and the memory it reads from."""

    def __init__(self, work: Any, tensor: torch.Tensor) -> None:
        self._work, self._tensor = work, tensor

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
