"""Pieces that a notebook on the rank's own machine reads from where they are: the kernel copies them once.

Nothing is set up for it and nothing is left of it. The rank only says where a piece is, and keeps it
there until it is given back. To a notebook on another machine it offers the piece, see
:mod:`flexmagic.engine.outlet`.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from flexmagic.engine.captures import Captures, Reader, RunKey
from flexmagic.engine.outlet import Offer, Outlet
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
    captures: Captures,
    which: tuple[RunKey, Site],
    parts: list[tuple[slice, ...]],
    reader: Reader,
    outlet: Outlet,
) -> list[Lent | Offer]:
    """Where slices of a captured piece are for a reader, its machine and process, until it gives them back.

    ``which``: the run and the site.
    """
    where, pid = reader
    piece = captures.get(*which)
    found = [piece[part].cpu().contiguous() for part in parts]  # without a copy where they are so already
    for gone in [other for other in captures.lent if other != reader and not _runs(other)]:
        give_back(captures, gone, outlet)  # it was ended while it read
    captures.lent[reader] = found
    if not where or where != machine():
        return list(outlet.offer(found))
    _allow(pid)
    return [Lent(os.getpid(), part.data_ptr(), part.nbytes) for part in found]


def give_back(captures: Captures, reader: Reader, outlet: Outlet) -> None:
    """Let go of what a reader had been lent."""
    outlet.withdraw(captures.lent.pop(reader, []))


def _runs(reader: Reader) -> bool:
    """Whether a reader's process is still there, as far as one can know."""
    where, pid = reader
    return where != machine() or Path(f"/proc/{pid}").exists()


def _allow(pid: int) -> None:
    """Where a system lets only a process's ancestors read it, let this one too."""
    with_errno = ctypes.CDLL(None, use_errno=True)
    with_errno.prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)  # where there is no such rule, it fails
