"""Memory of the notebook's that the ranks of its machine write into; see :mod:`flexmagic.engine.segments`."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from flexmagic.engine.segments import Segment

WORTH = 1 << 20
"""Bytes from which on memory is shared: below, a message is as fast."""


class Offered:
    """Memory that ranks may write into while it is offered, and that stays as long as a tensor views it."""

    def __init__(self, fd: int, segment: Segment) -> None:
        self._fd = fd
        self.segment = segment

    def tensor(self) -> torch.Tensor:
        """What was written, uint8 ``[nbytes]``, without a copy; writing into it stays in this process."""
        from flexmagic.engine.segments import mapped

        return mapped(self._fd, self.segment.nbytes, shared=False)


@contextlib.contextmanager
def offered(nbytes: int) -> Iterator[Offered]:
    """Memory for the length of a block; raises :class:`OSError` where the system gives none."""
    from flexmagic.engine.segments import TOKEN, Segment, machine

    fd = os.memfd_create("flexmagic", os.MFD_CLOEXEC)
    try:
        token = secrets.token_bytes(TOKEN)
        os.ftruncate(fd, nbytes + TOKEN)
        os.pwrite(fd, token, nbytes)
        yield Offered(fd, Segment(machine(), os.getpid(), fd, nbytes, token))
    finally:
        os.close(fd)
