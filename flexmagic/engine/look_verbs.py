"""What a client may ask of a rank about what it itself holds, and how two captures differ there."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from flexmagic.engine import look
from flexmagic.engine.captures import RunKey
from flexmagic.engine.runtime import Runtime
from flexmagic.engine.slot import verb
from flexmagic.layout.sites import Site
from flexmagic.view.reduce import (
    compare_values,
    compute_stats,
    count_between,
    difference_dtype,
    digest_of,
    merge_changes,
    merge_overviews,
)
from flexmagic.view.source import Change, Overview, Stats

Key = tuple[RunKey, Site]
"""A capture: its run and its site."""

_CHUNK = 1 << 20


@verb
def share(
    runtime: Runtime, run_id: RunKey, site: Site, edges: NDArray[np.float64], masked: look.Mask = None
) -> tuple[Stats, NDArray[np.int64]]:
    """Statistics of the rank's whole piece, and how many of its values lie in each bin."""
    values = look.as_array(runtime.captures.get(run_id, site))
    if masked is None:
        return compute_stats(values), count_between(values, edges)
    veil = np.broadcast_to(masked, values.shape)
    return compute_stats(values, veil), count_between(values[~veil], edges)


@verb
def masked_stats(
    runtime: Runtime, run_id: RunKey, site: Site, parts: list[tuple[tuple[slice, ...], look.Mask]]
) -> list[Stats]:
    """Counts and moments of slices of a piece, without what is masked of each."""
    piece = runtime.captures.get(run_id, site)
    return [look.stats(piece, *part) for part in parts]


@verb
def masked_overview(
    runtime: Runtime,
    run_id: RunKey,
    site: Site,
    parts: list[tuple[tuple[slice, ...], tuple[slice, ...], look.Mask]],
    window: look.Window,
) -> Overview:
    """The parts of a piece inside a window, without what is masked, reduced to the window's bins."""
    piece = runtime.captures.get(run_id, site)
    return merge_overviews(
        [look.overview(piece, local, result, window, veil) for local, result, veil in parts]
    )


@verb
def digest(runtime: Runtime, run_id: RunKey, site: Site) -> str:
    """A digest of the bytes of the rank's piece."""
    piece = runtime.captures.get(run_id, site)
    return digest_of(look.slice_bytes(piece, (slice(None),) * piece.ndim))


@verb
def change(runtime: Runtime, before: Key, after: Key) -> Change:
    """How the piece of one capture differs from that of another of the same layout."""
    a, b = runtime.captures.get(*before), runtime.captures.get(*after)
    parts = [compare_values(look.as_array(x), look.as_array(y), _same_bits(x, y)) for x, y in _chunks(a, b)]
    return merge_changes(parts)


@verb
def subtract(runtime: Runtime, before: Key, after: Key, seen: Site) -> int:
    """Keep the second capture minus the first under ``seen`` in the second's run; returns its bytes."""
    a, b = runtime.captures.get(*before), runtime.captures.get(*after)
    wide = getattr(torch, difference_dtype(_name(a), _name(b)))
    made = b.to(wide) - a.to(wide)
    runtime.captures.keep(after[0], seen, made)
    return made.nbytes


def _chunks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of flat stretches, so that little more memory is needed than the pieces have."""
    x, y = a.detach().contiguous().reshape(-1), b.detach().contiguous().reshape(-1)
    for start in range(0, max(x.numel(), 1), _CHUNK):
        yield x[start : start + _CHUNK], y[start : start + _CHUNK]


def _same_bits(x: torch.Tensor, y: torch.Tensor) -> NDArray[np.bool_]:
    if not math.prod(x.shape) or x.dtype != y.dtype:
        return np.zeros(tuple(x.shape), dtype=bool)
    raw_x, raw_y = (t.cpu().view(torch.uint8).reshape(t.numel(), -1).numpy() for t in (x, y))
    equal: NDArray[np.bool_] = (raw_x == raw_y).all(axis=-1)
    return equal


def _name(piece: torch.Tensor) -> str:
    return str(piece.dtype).removeprefix("torch.")
