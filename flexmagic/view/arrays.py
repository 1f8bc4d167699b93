"""A numpy array as a :class:`Source`: the oracle for every other one, and a viewer of arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.view.masks import mask_for
from flexmagic.view.pieces import gather_piece, present
from flexmagic.view.reduce import (
    compute_stats,
    count_between,
    digest_of,
    local_edges,
    merge_overviews,
    reduce_overview,
)
from flexmagic.view.source import Info, Piece, Share

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from flexmagic.view.source import Index, Overview, Stats

_NUMPYS = ("torch.float16", "torch.float32", "torch.float64")

Labels = dict[int, "Sequence[str] | Sequence[Sequence[str]]"]


def info_of(array: NDArray[Any], site: str = "array", **facts: Any) -> Info:
    """Return the :class:`Info` of an array that one rank owns; ``facts`` override any field."""
    known: dict[str, Any] = {
        "dims": tuple(f"dim{d}" for d in range(array.ndim)),
        "dtype": array.dtype.name,
        "pieces": (Piece(0, tuple((0, size) for size in array.shape)),),
        "nbytes": array.nbytes,
    }
    return Info(site=site, shape=array.shape, **(known | facts))


class ArraySource:
    """A numpy array with a layout, so that a distributed tensor can be imitated exactly.

    ``labels`` maps a dim to its texts, or to one sequence of texts per position of dim 0 (the
    tokens of each row of a batch). What only ``info.missing_ranks`` own is never reduced or read.
    ``held`` is what ranks hold themselves where that is not their part of ``array``: summands, or a
    replica that differs. ``note`` returns more to say of a position, and ``texts`` (an array of
    ``str`` of the same shape) what to write into its cell. ``masked`` (bools that broadcast to the
    shape) are elements to be shown as masked, and to be in no statistic.
    """

    def __init__(
        self,
        array: NDArray[Any],
        info: Info | None = None,
        labels: Labels | None = None,
        *,
        held: Mapping[int, NDArray[Any]] | None = None,
        note: Callable[[tuple[int, ...]], str] | None = None,
        texts: NDArray[np.str_] | None = None,
        masked: Any = None,
    ) -> None:
        self._array = np.asarray(array)
        self._info = info or info_of(self._array)
        self._labels = labels or {}
        self._held = dict(held or {})
        self.note = note
        self.texts = texts
        self._moved = 0
        if self._info.shape != self._array.shape:
            msg = f"info says {self._info.shape}, the array is {self._array.shape}"
            raise ValueError(msg)
        shape = self._array.shape
        self._masked = None if masked is None else np.broadcast_to(mask_for(masked, shape), shape)

    @property
    def info(self) -> Info:
        """What is known without data."""
        return self._info

    @property
    def bytes_moved(self) -> int:
        """Bytes handed out so far."""
        return self._moved

    def read(self, index: Index) -> NDArray[Any]:
        """Return a copy of the slice; holes hold NaN, or 0 in dtypes without NaN."""
        out = np.array(self._array[index])
        mask = present(self._info, index)
        if mask is not None:
            out[~mask] = np.nan if out.dtype.kind in "fc" else 0
        self._moved += out.nbytes
        return out

    def masked_at(self, index: Index) -> NDArray[np.bool_] | None:
        """Return which elements of a slice are masked."""
        return None if self._masked is None else self._masked[index]

    def stats(self) -> Stats:
        """Return the statistics of all elements that a reachable rank owns."""
        mask = present(self._info, (slice(None),) * self._array.ndim)
        hidden = self._masked
        if mask is not None:
            return compute_stats(self._array[mask], None if hidden is None else hidden[mask])
        return compute_stats(self._array, hidden)

    def overview(
        self,
        rows: int,
        cols: int,
        fixed: dict[int, int],
        row_edges: NDArray[np.int64],
        col_edges: NDArray[np.int64],
    ) -> Overview:
        """Reduce dims ``rows`` x ``cols``, piece by piece where some ranks are missing."""
        at: tuple[int | slice, ...] = tuple(fixed.get(d, slice(None)) for d in range(self._array.ndim))

        def turned(array: NDArray[Any]) -> NDArray[Any]:
            part = array[at]
            return part[None] if rows < 0 else part if rows < cols else part.T

        plane = turned(self._array)
        hidden = None if self._masked is None else turned(self._masked)
        parts = []
        for row_span, col_span in self._boxes(rows, cols, fixed):
            box = slice(*row_span), slice(*col_span)
            edges = local_edges(row_edges, *row_span), local_edges(col_edges, *col_span)
            masked = None if hidden is None else hidden[box]
            parts.append(reduce_overview(plane[box], *edges, (row_span[0], col_span[0]), masked))
        nothing = reduce_overview(plane, np.zeros_like(row_edges), np.zeros_like(col_edges))
        merged = merge_overviews([*parts, nothing]) if len(parts) != 1 else parts[0]
        self._moved += 28 * merged.n.size
        return type(merged)(**(vars(merged) | {"row_edges": row_edges, "col_edges": col_edges}))

    def labels(self, dim: int, fixed: Mapping[int, int] | None = None) -> Sequence[str] | None:
        """Return the texts of ``dim``, of the row of the batch that ``fixed`` names."""
        texts: Any = self._labels.get(dim)
        if texts and not isinstance(texts[0], str):
            return texts[(fixed or {}).get(0, 0)]
        return texts

    def shares(self, edges: NDArray[np.float64]) -> tuple[Share, ...]:
        """Return what each rank that can be reached holds, counted into bins."""
        shares = []
        for rank, part in self._parts().items():
            masked = None if self._masked is None else gather_piece(self._masked, self._info, rank)
            kept = part if masked is None else part[~masked]
            shares.append(Share(rank, compute_stats(part, masked), count_between(kept, edges)))
        return tuple(shares)

    def digests(self) -> dict[int, str]:
        """Return a digest of each reachable rank's bytes."""
        return {rank: digest_of(part.tobytes()) for rank, part in self._parts().items()}

    def _parts(self) -> dict[int, NDArray[Any]]:
        ranks = {piece.rank for piece in self._info.pieces} - set(self._info.missing_ranks)
        return {rank: self._local(rank) for rank in sorted(ranks)}

    def held(self, rank: int) -> ArraySource:
        """Return what one rank holds; its labels are those of the whole where it holds all of a dim."""
        local = self._local(rank)
        whole = tuple((0, size) for size in local.shape)
        info = replace(
            self._info, shape=local.shape, pieces=(Piece(rank, whole),), partial=False, missing_ranks=(),
            warnings=(), placements=(), nbytes=local.nbytes,
        )  # fmt: skip
        labels = {d: t for d, t in self._labels.items() if self._has_all(local, d)}
        masked = None if self._masked is None else gather_piece(self._masked, self._info, rank)
        return ArraySource(local, info, labels, masked=masked)

    def _has_all(self, local: NDArray[Any], dim: int) -> bool:
        return bool(local.shape[dim] == self._array.shape[dim])

    def _local(self, rank: int) -> NDArray[Any]:
        return self._held[rank] if rank in self._held else gather_piece(self._array, self._info, rank)

    def _boxes(
        self, rows: int, cols: int, fixed: dict[int, int]
    ) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return disjoint (row span, column span) boxes that cover what can be reached."""
        shape = self._array.shape
        if not self._info.missing_ranks:
            return [((0, 1) if rows < 0 else (0, shape[rows]), (0, shape[cols]))]
        boxes = {
            ((0, 1) if rows < 0 else piece.spans[rows], piece.spans[cols])
            for piece in self._info.pieces
            if piece.rank not in self._info.missing_ranks
            and all(start <= fixed[d] < stop for d, (start, stop) in enumerate(piece.spans) if d in fixed)
        }
        return sorted(boxes)


def numbers_of(values: Any) -> NDArray[Any]:
    """Return an array of a tensor (bf16 and fp8 as float32 of the same values), a list or an array.

    Of masked arrays it is the data; see :func:`~flexmagic.view.masks.mask_of`. Raises
    :class:`InputError` for what is no array of numbers.
    """
    if hasattr(values, "get_mask") and hasattr(values, "get_data"):
        values = values.get_data()
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        narrow = values.dtype.is_floating_point and str(values.dtype) not in _NUMPYS
        values = (values.float() if narrow else values).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of several lengths
        raise InputError(f"These are no array of numbers: {error}") from None
    if array.dtype.kind not in "biufc":
        raise InputError(f"{type(values).__name__} is no array of numbers.")
    return array
