"""Who owns what: ownership of boxes of the whole tensor. Pure, numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flexmagic.view.source import Piece

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from flexmagic.view.source import Index, Info


def split(shape: Sequence[int], dim: int, sizes: Sequence[int]) -> tuple[Piece, ...]:
    """Return the pieces of ranks 0, 1, ... that own ``sizes`` positions of ``dim`` in turn.

    Raises ``ValueError`` unless the sizes add up to the dim.
    """
    if sum(sizes) != shape[dim]:
        msg = f"sizes {tuple(sizes)} do not add up to {shape[dim]}"
        raise ValueError(msg)
    whole = [(0, size) for size in shape]
    stops = np.cumsum(sizes).tolist()
    return tuple(
        Piece(rank, (*whole[:dim], (stop - size, stop), *whole[dim + 1 :]))
        for rank, (size, stop) in enumerate(zip(sizes, stops, strict=True))
    )


def present(info: Info, index: Index) -> NDArray[np.bool_] | None:
    """Return which elements of ``read(index)`` some reachable rank owns; None for all of them.

    The mask has the shape of the slice. A tensor without pieces is taken as wholly present.
    """
    if not info.missing_ranks or not info.pieces:
        return None
    windows = [
        (at, at + 1) if isinstance(at, (int, np.integer)) else at.indices(size)[:2]
        for at, size in zip(index, info.shape, strict=True)
    ]
    mask = np.zeros([max(stop - start, 0) for start, stop in windows], dtype=bool)
    for piece in info.pieces:
        if piece.rank not in info.missing_ranks:
            mask[
                tuple(
                    slice(max(start - first, 0), max(stop - first, 0))
                    for (start, stop), (first, _) in zip(piece.spans, windows, strict=True)
                )
            ] = True
    dropped = tuple(d for d, at in enumerate(index) if isinstance(at, (int, np.integer)))
    mask = mask.squeeze(axis=dropped)
    return None if mask.all() else mask


def owners(info: Info, position: Sequence[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return ``(rank, local index there)`` of every rank that owns the element, lowest rank first."""
    found = []
    for piece in info.pieces:
        if all(start <= at < stop for at, (start, stop) in zip(position, piece.spans, strict=True)):
            origin = piece.local or (0,) * len(piece.spans)
            local = tuple(
                at - start + base for at, (start, _), base in zip(position, piece.spans, origin, strict=True)
            )
            found.append((piece.rank, local))
    return tuple(sorted(found))
