"""Looking at a local piece: slices, statistics and reduced overviews, computed where the piece is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexmagic.view.reduce import compute_stats, local_edges, reduce_overview
from flexmagic.view.source import Overview, Stats


def slice_bytes(piece: torch.Tensor, index: tuple[slice, ...]) -> NDArray[np.uint8]:
    """A slice's raw memory (row-major) as uint8 ``[nbytes]``: every dtype keeps its bits."""
    part = piece[index].contiguous().cpu()
    return part.reshape(-1).view(torch.uint8).numpy() if part.numel() else np.empty(0, np.uint8)


def as_array(piece: torch.Tensor) -> NDArray[Any]:
    """The same values in a dtype numpy has: float32 for bf16 and fp8, everything else as itself."""
    plain = piece.detach().cpu()
    if plain.dtype.is_floating_point and plain.dtype not in (torch.float16, torch.float32, torch.float64):
        plain = plain.to(torch.float32)
    return plain.numpy()


Mask = NDArray[np.bool_] | None
"""What of a slice is masked, of as many dims, each of its size or of size 1; ``None`` for nothing."""


def stats(piece: torch.Tensor, index: tuple[slice, ...], masked: Mask = None) -> Stats:
    """Counts and moments of a slice of a piece."""
    part = as_array(piece[index])
    return compute_stats(part, None if masked is None else np.broadcast_to(masked, part.shape))


@dataclass(frozen=True)
class Window:
    """Two dims of a whole tensor cut into bins, every other dim held at one global position.

    ``rows`` is -1 for a tensor of one dim, which is one row.
    """

    rows: int
    cols: int
    fixed: dict[int, int]
    row_edges: NDArray[np.int64]
    col_edges: NDArray[np.int64]

    def bounds(self, ndim: int) -> tuple[tuple[int, int], ...]:
        """The global span per dim that the window covers."""
        out = [(self.fixed.get(dim, 0), self.fixed.get(dim, 0) + 1) for dim in range(ndim)]
        for dim, edges in ((self.rows, self.row_edges), (self.cols, self.col_edges)):
            if dim >= 0:
                out[dim] = (int(edges[0]), int(edges[-1]))
        return tuple(out)


def overview(
    piece: torch.Tensor,
    local: tuple[slice, ...],
    result: tuple[slice, ...],
    window: Window,
    masked: Mask = None,
) -> Overview:
    """Reduce the part ``piece[local]`` that lies at ``result`` inside the window to the window's bins."""
    part = as_array(piece[local])
    flat = _flat(part, window)
    veil = None if masked is None else _flat(np.broadcast_to(masked, part.shape), window)
    first_col = int(window.col_edges[0]) + result[window.cols].start
    col_edges = _own_edges(window.col_edges, result[window.cols])
    if window.rows < 0:
        return reduce_overview(flat, window.row_edges, col_edges, (0, first_col), veil)
    first_row = int(window.row_edges[0]) + result[window.rows].start
    row_edges = _own_edges(window.row_edges, result[window.rows])
    return reduce_overview(flat, row_edges, col_edges, (first_row, first_col), veil)


def _flat(part: NDArray[Any], window: Window) -> NDArray[Any]:
    """The part as rows by columns of the window, all other dims having one position."""
    flat = part.squeeze(axis=tuple(dim for dim in range(part.ndim) if dim not in (window.rows, window.cols)))
    return flat[None] if window.rows < 0 else flat.T if window.rows > window.cols else flat


def _own_edges(edges: NDArray[np.int64], part: slice) -> NDArray[np.int64]:
    """Bin edges inside a part of the window, given where the part lies in the window."""
    return local_edges(edges, int(edges[0]) + part.start, int(edges[0]) + part.stop)
