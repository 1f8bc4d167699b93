"""Memory in which ranks of one machine leave their pieces for each other, so that no socket carries them.

A rank leaves its piece before the ranks tell each other what they have; once all have told, the pieces
can be read. There are two places in turn: when a rank comes back to one, all have told each other
something since, and nobody reads there any more.
"""

from __future__ import annotations

import os
import secrets
import struct
import zlib
from collections.abc import Callable, Mapping

import torch

from flexmagic.engine.segments import TOKEN, Segment, machine, mapped, opened

LEAST, MOST = 1 << 16, 1 << 26
"""Bytes of a place at least, and of the largest piece that is left in one; what is larger is sent."""

NEVER, NOT_YET, LEFT = -1, 0, 1
"""What a rank tells of its piece: it cannot be left, there is no place for it yet, it is there."""

_TOKEN = struct.Struct("qq")

Meet = Callable[[torch.Tensor], dict[int, torch.Tensor]]
"""Tells all ranks some numbers ``int64`` and gives what each of them told."""


class Outboxes:
    """A rank's two places and those of the others, for exchanges of all ranks of a group."""

    def __init__(self) -> None:
        self._places: dict[int, torch.Tensor] = {}
        self._turn = 0
        self.machine = zlib.crc32(machine().encode())

    def leave(self, piece: torch.Tensor, rank: int) -> int:
        """Leave a piece where the others will find it, if it has room there."""
        if piece.device.type != "cpu" or piece.nbytes > MOST or not self.machine:
            return NEVER
        own = self._places.get(rank)
        if own is None or piece.nbytes > len(own) // 2:
            return NOT_YET
        self._place(own, piece.shape, piece.dtype).copy_(piece)
        return LEFT

    def pieces(self, shapes: Mapping[int, tuple[int, ...]], dtype: torch.dtype) -> dict[int, torch.Tensor]:
        """What ranks have left, by rank, to be read before the next exchange."""
        return {rank: self._place(self._places[rank], shape, dtype) for rank, shape in shapes.items()}

    def next(self) -> None:
        """Go on to the other place: all ranks have told each other that they left something in this one."""
        self._turn += 1

    def _place(self, memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        half = len(memory) // 2
        start, size = half * (self._turn % 2), dtype.itemsize
        for n in shape:
            size *= n
        return memory[start : start + size].view(dtype).view(shape)

    def make(self, nbytes: int, rank: int, meet: Meet) -> None:
        """Make places for pieces of so many bytes; all ranks call it at once, and all have them or none."""
        half = max(LEAST, 1 << (nbytes - 1).bit_length())
        token = secrets.token_bytes(TOKEN)
        fd = os.memfd_create("flexmagic", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, 2 * half + TOKEN)
            os.pwrite(fd, token, 2 * half)
            numbers = [
                os.getpid(),
                fd,
                *(int.from_bytes(token[at : at + 8], "little", signed=True) for at in (0, 8)),
            ]
            told = meet(torch.tensor(numbers))
            found: dict[int, torch.Tensor] = {rank: mapped(fd, 2 * half)}
            for other, said in told.items():
                memory = found.get(other, opened(_segment(said.tolist(), 2 * half)))
                if isinstance(memory, torch.Tensor):
                    found[other] = memory
            well = meet(torch.tensor([int(len(found) == len(told))]))
        finally:
            os.close(fd)
        if all(bool(said[0]) for said in well.values()):
            self._places, self._turn = found, 0
        else:
            self.machine = 0


def _segment(numbers: list[int], nbytes: int) -> Segment:
    pid, fd, *token = numbers
    return Segment(machine(), pid, fd, nbytes, _TOKEN.pack(*token))
