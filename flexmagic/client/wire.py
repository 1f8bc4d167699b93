"""How the pieces of an activation come to the notebook.

From ranks of its own machine by one copy that the kernel makes, out of their memory into the notebook's
array. From others in messages of a bounded size, one after the other, so that neither side nor the
controller between them ever holds more.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from flexmagic.layout.assemble import Index, Read

WORTH = 1 << 20
"""Bytes from which on memory is read where it is: below, a message is as fast."""

MESSAGE = 32 << 20
"""Bytes that one rank sends in one message."""

STRETCH = 16 << 20
"""Bytes that one thread reads at a time."""

Ask = Callable[..., list[Any]]
"""Sends each read's part to its rank with a verb; answers in the order of the reads."""


@dataclass(frozen=True)
class Line:
    """A capture's ranks: to ``ask`` them, to ``tell`` one that all is read, and to have them for oneself."""

    ask: Ask
    tell: Callable[[int, int], None]
    turn: Callable[[], AbstractContextManager[Any]]


Arriving = Callable[[int, int], None]
"""Hears how many bytes have come, of how many."""


def fetch(
    line: Line,
    reads: Sequence[Read],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    add: bool = False,
    progress: Arriving | None = None,
) -> torch.Tensor:
    """A tensor out of what ranks hold; places that no read covers are zero. ``add``: reads are addends."""
    import torch

    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    size = dtype.itemsize
    total = sum(nbytes(read.local, size) for read in reads)
    tell = progress or (lambda _here, _total: None)
    array = np.empty(math.prod(shape) * size, np.uint8)  # numpy takes large pages, which cost far less
    out = torch.from_numpy(array).view(dtype).reshape(shape)
    if add or total < array.nbytes:
        out.zero_()
    left = list(reads)
    if not add and total >= WORTH:
        left = _read_in_place(line, left, array.view(_ANY[size]).reshape(shape), lambda n: tell(n, total))
    here = total - sum(nbytes(read.local, size) for read in left)
    for stretch in stretches(left, size, MESSAGE):
        for read, raw in zip(stretch, line.ask("read", stretch, [r.local for r in stretch]), strict=True):
            _put(out[read.result], raw, add=add)
            here += raw.nbytes
        tell(here, total)
    return out


_ANY = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
"""Some dtype of each size: bits are only copied."""


def _read_in_place(
    line: Line, reads: list[Read], out: NDArray[Any], tell: Callable[[int], None]
) -> list[Read]:
    """Read what ranks of this machine hold from their memory; returns what has to come otherwise.

    No other notebook can have the ranks do anything meanwhile, so that what is read stays as it is.
    """
    from flexmagic.client.reading import Readers
    from flexmagic.engine.segments import machine

    pid, here, pending = os.getpid(), 0, []
    readers = Readers()
    with line.turn():
        lent = line.ask("lend", reads, [read.local for read in reads], (machine(), pid))
        try:
            for read, where in zip(reads, lent, strict=True):
                start = 0
                for part in _cut(read, out.itemsize, STRETCH) if where is not None else ():
                    size = nbytes(part.local, out.itemsize)
                    pending.append((size, readers.read(out, part.result, where, start, size)))
                    start += size
            for size, done in pending:
                done.result()
                here += size
                tell(here)
        except OSError as error:
            _warn(error.strerror or str(error))
            return reads
        finally:
            readers.stop()
            for rank in {read.rank for read, where in zip(reads, lent, strict=True) if where is not None}:
                line.tell(rank, pid)
    return [read for read, where in zip(reads, lent, strict=True) if where is None]


def _warn(reason: str) -> None:
    warnings.warn(
        f"The engines' memory cannot be read from here ({reason}): what they hold comes "
        "through the controller, which takes several times as long.",
        stacklevel=2,
    )


def stretches(reads: Sequence[Read], itemsize: int, most: int) -> Iterator[list[Read]]:
    """Reads, cut where they are larger, in groups in which no rank has more than ``most`` bytes."""
    by_rank: dict[int, list[Read]] = {}
    for read in reads:
        by_rank.setdefault(read.rank, []).extend(_cut(read, itemsize, most))
    while by_rank:
        group = []
        for rank, waiting in list(by_rank.items()):
            size = 0
            while waiting and (not size or size + nbytes(waiting[0].local, itemsize) <= most):
                size += nbytes(waiting[0].local, itemsize)
                group.append(waiting.pop(0))
            if not waiting:
                del by_rank[rank]
        yield group


def _cut(read: Read, itemsize: int, most: int) -> Iterator[Read]:
    """A read in parts of at most so many bytes, along the first dim that has more than one entry."""
    size = nbytes(read.local, itemsize)
    dim = next((d for d, part in enumerate(read.local) if part.stop - part.start > 1), None)
    if size <= most or dim is None:
        yield read
        return
    length = read.local[dim].stop - read.local[dim].start
    step = max(1, most * length // size)
    for at in range(0, length, step):
        part = replace(
            read,
            local=_narrowed(read.local, dim, at, min(at + step, length)),
            result=_narrowed(read.result, dim, at, min(at + step, length)),
        )
        yield from _cut(part, itemsize, most)


def _narrowed(index: Index, dim: int, start: int, stop: int) -> Index:
    first = index[dim].start
    return (*index[:dim], slice(first + start, first + stop), *index[dim + 1 :])


def nbytes(index: Index, itemsize: int) -> int:
    """Bytes of a slice."""
    return math.prod(part.stop - part.start for part in index) * itemsize


def _put(place: torch.Tensor, raw: Any, *, add: bool) -> None:
    """Copy a message's bytes to their place, or add what they are."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
        part = torch.from_numpy(raw).view(place.dtype).reshape(place.shape)
    if add:
        place += part
    else:
        place.copy_(part)
