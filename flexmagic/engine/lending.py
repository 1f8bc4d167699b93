"""Pieces that a notebook on the rank's own machine reads from where they are: the kernel copies them once.

Nothing is set up for it and nothing is left of it. The rank only says where a piece is, and keeps it
there until it is given back.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from flexmagic.engine.captures import Captures, RunKey
from flexmagic.engine.segments import machine
from flexmagic.layout.sites import Site

_PR_SET_PTRACER = 0x59616D61


@dataclass(frozen=True)
class Lent:
    """Where a slice of a piece is, row-major without gaps, as the rank's process says it; plain data."""

    pid: int
    address: int
    nbytes: int


def lend(
    captures: Captures, run: RunKey, site: Site, parts: list[tuple[slice, ...]], reader: tuple[str, int]
) -> list[Lent | None]:
    """Where slices of a captured piece are for a reader, its machine and process; ``None`` on another one."""
    where, pid = reader
    if not where or where != machine():
        return [None] * len(parts)
    _allow(pid)
    piece = captures.get(run, site)
    found = [piece[part].cpu().contiguous() for part in parts]  # without a copy where they are so already
    captures.lent[pid] = found
    return [Lent(os.getpid(), part.data_ptr(), part.nbytes) for part in found]


def _allow(pid: int) -> None:
    """Where a system lets only a process's ancestors read it, let this one too."""
    with_errno = ctypes.CDLL(None, use_errno=True)
    with_errno.prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)  # where there is no such rule, it fails
