"""Memory for what is looked at, used again where nobody has what came last.

To get new pages, which the system fills with zeros first, takes about as long as to copy what is looked at.
"""

from __future__ import annotations

import mmap
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST, MOST = 1 << 20, 64 << 20
"""Bytes of an array whose memory is kept: of smaller ones it is not worth it, larger ones hold too much."""


class Spare:
    """Keeps the memory of the last array that it gave."""

    def __init__(self) -> None:
        self._kept: mmap.mmap | None = None
        self._alone = 0  # how many refer to it when no array is on it
        self._lock = threading.Lock()

    def array(self, nbytes: int) -> NDArray[np.uint8]:
        """An array of so many bytes, whatever they are; its memory is nobody else's while it is in use."""
        if not LEAST <= nbytes <= MOST or not hasattr(mmap, "MAP_PRIVATE"):
            return np.empty(nbytes, np.uint8)  # numpy takes large pages, which cost far less
        with self._lock:
            if not self._is_free(nbytes):
                self._kept = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self._alone = self._referring()
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    self._kept.madvise(mmap.MADV_HUGEPAGE)
            assert self._kept is not None  # made just above
            return np.frombuffer(self._kept, np.uint8, nbytes)

    def _is_free(self, nbytes: int) -> bool:
        """Whether what is kept fits and no array is on it: each, and each view of one, refers to it."""
        if self._kept is None or not nbytes <= len(self._kept) <= 2 * nbytes:
            return False
        return self._referring() == self._alone

    def _referring(self) -> int:
        """How many refer to what is kept; Pythons differ in whom they count, so it is only compared."""
        return sys.getrefcount(self._kept)
