"""What an engine and a box say to each other: a line of JSON, and tensors in memory that both see.

Neither side unpickles anything of the other. The engine takes nothing from a box that it has not checked:
what runs in there is anybody's code.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

HEAD = struct.Struct("<I")
LONGEST = 1 << 20
"""Bytes of a message at most."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        torch.complex64, torch.complex128,
    )
}  # fmt: skip
"""The dtypes of tensors that pass."""

ALIGNED = 64
"""Tensors begin at multiples of so many bytes."""


class BoxError(Exception):
    """What came out of a box is not what may come out of one, or nothing came."""


@dataclass(frozen=True)
class Placed:
    """A tensor in the shared memory: contiguous, from ``start``."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def plain(self) -> list[Any]:
        """As it travels."""
        return [self.start, list(self.shape), str(self.dtype).removeprefix("torch.")]

    @classmethod
    def checked(cls, said: Any, end: int) -> Placed:
        """What somebody said of a tensor in memory of so many bytes; raises :class:`BoxError`."""
        if not (
            isinstance(said, list) and len(said) == 3 and isinstance(said[1], list) and said[2] in DTYPES
        ):
            raise BoxError("a tensor was described in words that are none")
        numbers = [said[0], *said[1]]
        if any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers) or len(said[1]) > 16:
            raise BoxError("a tensor was described with numbers that are none")
        found = cls(said[0], tuple(said[1]), DTYPES[said[2]])
        if found.start % found.dtype.itemsize or found.start + found.nbytes > end:
            raise BoxError("a tensor was said to lie outside of the memory")
        return found

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor itself, in memory as uint8 ``[n]``."""
        return memory[self.start : self.start + self.nbytes].view(self.dtype).reshape(self.shape)


def placed(tensors: Sequence[torch.Tensor], start: int) -> Iterator[Placed]:
    """Places for tensors, one after the other."""
    for tensor in tensors:
        start = -(-start // ALIGNED) * ALIGNED
        found = Placed(start, tuple(tensor.shape), tensor.dtype)
        yield found
        start += found.nbytes


def send(link: socket.socket, said: Any) -> None:
    """Say something; raises :class:`OSError` if nobody is there."""
    raw = json.dumps(said).encode()
    if len(raw) > LONGEST:
        raise BoxError(f"a message of {len(raw):,} bytes is too long")
    link.sendall(HEAD.pack(len(raw)) + raw)


def hear(link: socket.socket) -> Any:
    """What was said; raises :class:`EOFError` at the end, :class:`BoxError` for what is no message."""
    (size,) = HEAD.unpack(_exactly(link, HEAD.size))
    if size > LONGEST:
        raise BoxError(f"a message of {size:,} bytes was announced")
    try:
        return json.loads(_exactly(link, size))
    except (ValueError, RecursionError):
        raise BoxError("a message was no JSON") from None


def _exactly(link: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = link.recv(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
