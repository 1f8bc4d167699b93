"""Who owns what: ownership of boxes of the whole tensor. Pure, numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
            origin = _origin(piece)
            local = tuple(
                at - start + base for at, (start, _), base in zip(position, piece.spans, origin, strict=True)
            )
            found.append((piece.rank, local))
    return tuple(sorted(found))


def gather_piece(whole: NDArray[Any], info: Info, rank: int) -> NDArray[Any]:
    """Return a rank's own tensor, put together from its boxes of the whole."""
    boxes = [piece for piece in info.pieces if piece.rank == rank]
    ends = [
        [base + stop - start for base, (start, stop) in zip(_origin(piece), piece.spans, strict=True)]
        for piece in boxes
    ]
    out = np.zeros([max(at) for at in zip(*ends, strict=True)], dtype=whole.dtype)
    for piece, end in zip(boxes, ends, strict=True):
        here = tuple(slice(base, stop) for base, stop in zip(_origin(piece), end, strict=True))
        out[here] = whole[tuple(slice(*span) for span in piece.spans)]
    return out


def copies(info: Info) -> tuple[tuple[int, ...], ...]:
    """Return the ranks that hold the same boxes (and summand), one tuple per different content."""
    held: dict[int, set[tuple[Any, ...]]] = {}
    for piece in info.pieces:
        held.setdefault(piece.rank, set()).add((piece.spans, piece.addend))
    groups: dict[frozenset[tuple[Any, ...]], list[int]] = {}
    for rank in sorted(held):
        groups.setdefault(frozenset(held[rank]), []).append(rank)
    return tuple(tuple(ranks) for ranks in groups.values())


def _origin(piece: Piece) -> tuple[int, ...]:
    return piece.local or (0,) * len(piece.spans)
