"""How the pieces of an activation come to the notebook.

From ranks of its own machine by one copy that the kernel makes, out of their memory into the notebook's
array. From others straight from each rank, a few parts at a time; where there is no route to it, in
messages of a bounded size through the controller, one after the other. So no side ever holds more.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flexmagic.client.spare import Spare

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch
    from numpy.typing import NDArray

    from flexmagic.client.reading import Readers
    from flexmagic.engine.captures import Reader
    from flexmagic.engine.lending import Lent
    from flexmagic.engine.outlet import Offer
    from flexmagic.layout.assemble import Index, Read

WORTH = 1 << 20
"""Bytes from which on memory is read where it is: below, a message is as fast."""

MESSAGE = 32 << 20
"""Bytes that one rank sends in one message."""

STRETCH = 16 << 20
"""Bytes that one thread reads at a time."""

SENT = 4 << 20
"""Bytes of one of the parts in which a rank of another machine sends what it holds."""

SPARE = Spare()

Ask = Callable[..., list[Any]]
"""Sends each read's part to its rank with a verb; answers in the order of the reads."""


@dataclass(frozen=True)
class Line:
    """A capture's ranks: to ``ask`` them, to ``tell`` one that all is read, and to have them for oneself.

    ``unreachable``: where ranks on other machines were found not to be reached directly.
    """

    ask: Ask
    tell: Callable[[int, Reader], None]
    turn: Callable[[], AbstractContextManager[Any]]
    unreachable: set[str]


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
    array = SPARE.array(math.prod(shape) * size)
    out = torch.from_numpy(array).view(dtype).reshape(shape)
    if add or total < array.nbytes:
        out.zero_()
    left = list(reads)
    if not add and total >= WORTH:
        left = _read_large(line, left, array.view(_ANY[size]).reshape(shape), lambda n: tell(n, total))
    here = total - sum(nbytes(read.local, size) for read in left)
    for stretch in stretches(left, size, MESSAGE):
        for read, raw in zip(stretch, line.ask("read", stretch, [r.local for r in stretch]), strict=True):
            _put(out[read.result], raw, add=add)
            here += raw.nbytes
        tell(here, total)
    return out


_ANY = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
"""Some dtype of each size: bits are only copied."""


def _read_large(line: Line, reads: list[Read], out: NDArray[Any], tell: Callable[[int], None]) -> list[Read]:
    """Have what ranks lend, from their memory or sent by them; returns what has to come otherwise.

    No other notebook can have the ranks do anything meanwhile, so that what is read stays as it is.
    """
    from flexmagic.client.reading import Readers
    from flexmagic.engine.segments import machine

    reader, total = (machine(), os.getpid()), 0

    def came(nbytes: int) -> None:
        nonlocal total
        total += nbytes
        tell(total)

    with line.turn(), contextlib.closing(Readers()) as readers:
        readers.make_room(out)  # while the ranks are asked
        lent = line.ask("lend", reads, [read.local for read in reads], reader)
        try:
            return _had(readers, line.unreachable, list(zip(reads, lent, strict=True)), out, came)
        finally:
            readers.close()
            for rank in {read.rank for read in reads}:
                line.tell(rank, reader)


def _had(
    readers: Readers,
    unreachable: set[str],
    found: list[tuple[Read, Lent | Offer]],
    out: NDArray[Any],
    came: Callable[[int], None],
) -> list[Read]:
    """Have each read from where it is; returns those that could not be had."""
    from flexmagic.engine.lending import Lent

    near = [(read, where) for read, where in found if isinstance(where, Lent)]
    far = [(read, where) for read, where in found if not isinstance(where, Lent)]
    return _in_place(readers, near, out, came) + _sent(unreachable, far, out, came)


def _in_place(
    readers: Readers, found: list[tuple[Read, Lent]], out: NDArray[Any], came: Callable[[int], None]
) -> list[Read]:
    """Read what ranks of this machine hold from their memory; returns what may not be read."""
    here = 0
    pending: list[tuple[int, Future[None]]] = []
    try:
        for read, where in found:
            for part, start, size in _parts(read, out.itemsize, STRETCH):
                pending.append((size, readers.read(out, part.result, where, start, size)))
        for size, done in pending:
            done.result()
            here += size
            came(size)
    except OSError as error:
        came(-here)
        if error.errno != errno.ESRCH:  # an engine that has ended says so itself when it is asked
            _warn(error.strerror or str(error))
        readers.close()  # nothing more is to come into what is then had otherwise
        return [read for read, _ in found]
    return []


def _sent(
    unreachable: set[str], found: list[tuple[Read, Offer]], out: NDArray[Any], came: Callable[[int], None]
) -> list[Read]:
    """Have ranks of other machines send what they hold; returns what of it they could not."""
    from flexmagic.client.direct import Wanted, receive

    wanted = [
        Wanted(part, where, start, size)
        for read, where in found
        if where.endpoint not in unreachable
        for part, start, size in _parts(read, out.itemsize, SENT)
    ]
    nowhere = [read for read, where in found if where.endpoint in unreachable]
    return nowhere + [one.read for one in receive(out, wanted, unreachable, came)]


def _parts(read: Read, itemsize: int, most: int) -> Iterator[tuple[Read, int, int]]:
    """A read in parts of at most so many bytes, with where each begins in it and its bytes."""
    start = 0
    for part in _cut(read, itemsize, most):
        size = nbytes(part.local, itemsize)
        yield part, start, size
        start += size


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
