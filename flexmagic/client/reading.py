"""Reading memory of another process of this machine into one's own, without its taking part in it."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic.engine.lending import Lent
    from flexmagic.layout.assemble import Index

AT_ONCE = 1024
"""Places that one call of the system fills at most."""

SHORT = 256
"""Bytes below which a row is not worth a place of its own: such are read together, and then copied."""

THREADS = 4

AHEAD = 64 << 20
"""Bytes of an array that get their memory while ranks are asked."""

AT_A_TIME = 4 << 20
"""Bytes that get it at a time."""


@dataclass(frozen=True)
class Box:
    """A slice of an array, row-major and without gaps otherwise: where it begins and its rows."""

    offsets: NDArray[np.uint64]
    row: int

    @classmethod
    def of(cls, shape: tuple[int, ...], itemsize: int, index: Index) -> Box:
        """The rows of a slice, in bytes from the array's start, joined as far as they follow each other."""
        strides = [itemsize] * len(shape)
        for dim in range(len(shape) - 2, -1, -1):
            strides[dim] = strides[dim + 1] * shape[dim + 1]
        sizes = [part.stop - part.start for part in index]
        inner = len(shape)
        row = itemsize
        while inner:
            inner -= 1
            row *= sizes[inner]
            if sizes[inner] != shape[inner]:
                break
        offsets = np.array([sum(p.start * s for p, s in zip(index, strides, strict=True))], np.uint64)
        for dim in range(inner):
            steps = np.arange(sizes[dim], dtype=np.uint64) * np.uint64(strides[dim])
            offsets = (offsets[:, None] + steps).reshape(-1)
        return cls(offsets, row)


def read(out: NDArray[Any], index: Index, lent: Lent, start: int, nbytes: int) -> None:
    """Fill a slice of an array with bytes of what was lent; raises :class:`OSError` where that is refused."""
    box = Box.of(out.shape, out.itemsize, index)
    if box.row < SHORT <= nbytes:
        part = np.empty(nbytes, np.uint8)
        read(part, (slice(0, nbytes),), lent, start, nbytes)
        out[index] = part.view(out.dtype).reshape(out[index].shape)
        return
    places = np.empty((len(box.offsets), 2), np.uint64)
    places[:, 0] = box.offsets + np.uint64(out.ctypes.data)
    places[:, 1] = box.row
    for first in range(0, len(places), AT_ONCE):
        some = places[first : first + AT_ONCE]
        _fill(some, lent.pid, lent.address + start + first * box.row)


def _fill(places: NDArray[np.uint64], pid: int, address: int) -> None:
    """Fill places ``[n, 2]``, addresses and lengths, from another process's memory; other threads go on."""
    there = (ctypes.c_size_t * 2)()
    while len(places):
        there[:] = [address, int(places[:, 1].sum())]
        done = _READV(pid, places.ctypes.data, len(places), ctypes.addressof(there), 1, 0)
        if done <= 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        address += done
        ends = np.cumsum(places[:, 1])
        whole = int(np.searchsorted(ends, done, "right"))
        rest = done - (int(ends[whole - 1]) if whole else 0)
        places = places[whole:].copy()
        if rest:
            places[0] += np.array([rest, -rest], np.int64).view(np.uint64)


def make_room(start: int, nbytes: int) -> None:
    """Have the system give memory to whole pages of a stretch of addresses now, not at the first touch.

    Nothing happens where a system does not know how.
    """
    page = mmap.PAGESIZE
    first = -(-start // page) * page
    length = (start + nbytes - first) // page * page
    if length > 0:
        _MADVISE(first, length, _POPULATE_WRITE)


class Readers:
    """What some threads, which all share, read at the same time for one look."""

    def __init__(self) -> None:
        self._begun: list[Future[None]] = []

    def make_room(self, out: NDArray[Any]) -> None:
        """Begin with :func:`make_room` for the first :data:`AHEAD` bytes of an array without gaps."""
        for start in range(0, min(out.nbytes, AHEAD), AT_A_TIME):
            size = min(out.nbytes - start, AT_A_TIME)
            self._begin(make_room, out.ctypes.data + start, size)

    def read(self, *args: Any) -> Future[None]:
        """:func:`read`, on one of them."""
        return self._begin(read, *args)

    def close(self) -> None:
        """Wait for what has begun, and have no more of it begin."""
        wait([future for future in self._begun if not future.cancel()])

    def _begin(self, work: Callable[..., None], *args: Any) -> Future[None]:
        self._begun.append(future := _threads(os.getpid()).submit(work, *args))
        return future


@functools.lru_cache(maxsize=1)
def _threads(_pid: int) -> ThreadPoolExecutor:
    """Made once for a process: a thread that starts needs memory, for which it waits for what reads."""
    return ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0))), "flexmagic-reader")


_MADVISE = ctypes.CDLL(None).madvise
_MADVISE.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_POPULATE_WRITE = 23
"""Of Linux from 5.14 on."""

_READV = ctypes.CDLL(None, use_errno=True).process_vm_readv
_READV.restype = ctypes.c_ssize_t
_READV.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]
