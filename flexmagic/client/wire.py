"""How the pieces of an activation come to the notebook.

From ranks of the notebook's own machine through memory that it shares with them: each writes its piece
to its place, once, and the notebook's tensor is that memory. From others in messages of a bounded size,
one after the other, so that neither side nor the controller between them ever holds more.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flexmagic.client.segments import WORTH, offered

if TYPE_CHECKING:
    import torch

    from flexmagic.layout.assemble import Index, Read

MESSAGE = 32 << 20
"""Bytes that one rank sends in one message."""

STRETCH = 512 << 20
"""Bytes that one rank writes into shared memory between two times that progress is told."""

Ask = Callable[..., list[Any]]
"""Sends each read's part to its rank with a verb; answers in the order of the reads."""

Arriving = Callable[[int, int], None]
"""Hears how many bytes have come, of how many."""


def fetch(
    ask: Ask,
    reads: Sequence[Read],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    add: bool = False,
    progress: Arriving | None = None,
) -> torch.Tensor:
    """A tensor out of what ranks hold; places that no read covers are zero. ``add``: reads are addends."""
    import torch

    total = sum(nbytes(read.local, dtype.itemsize) for read in reads)
    here, tell = 0, progress or (lambda _here, _total: None)
    out, left = None, list(reads)
    if not add and total >= WORTH:
        out, left = _shared(ask, left, shape, dtype, lambda n: tell(n, total))
        here = total - sum(nbytes(read.local, dtype.itemsize) for read in left)
    if out is None:
        out = torch.zeros(shape, dtype=dtype)
    for stretch in stretches(left, dtype.itemsize, MESSAGE):
        for read, raw in zip(stretch, ask("read", stretch, [r.local for r in stretch]), strict=True):
            _put(out[read.result], raw, add=add)
            here += raw.nbytes
        tell(here, total)
    return out


def _shared(
    ask: Ask, reads: list[Read], shape: tuple[int, ...], dtype: torch.dtype, tell: Callable[[int], None]
) -> tuple[torch.Tensor | None, list[Read]]:
    """What ranks of this machine wrote into shared memory, if any did, and the reads that are left."""
    left: list[Read] = []
    here, reasons = 0, set[str]()
    with contextlib.ExitStack() as stack:
        try:
            memory = stack.enter_context(offered(math.prod(shape) * dtype.itemsize))
        except OSError as error:
            _warn({f"there is none: {error.strerror}"})
            return None, reads
        for stretch in stretches(reads, dtype.itemsize, STRETCH):
            refused = {read.rank for read in left}
            asked = [read for read in stretch if read.rank not in refused]
            left += [read for read in stretch if read.rank in refused]
            parts = [(read.local, read.result) for read in asked]
            for read, said in zip(asked, ask("write", asked, parts, memory.segment, shape), strict=True):
                if said == "":
                    here += nbytes(read.local, dtype.itemsize)
                else:
                    left.append(read)
                    reasons |= {said} if said else set()
            tell(here)
        if reasons:
            _warn(reasons)
        return (memory.tensor().view(dtype).reshape(shape) if here else None), left


def _warn(reasons: set[str]) -> None:
    warnings.warn(
        f"Memory could not be shared with the engines ({'; '.join(sorted(reasons))}): data of theirs came "
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
