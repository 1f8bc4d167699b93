"""The seam between a distributed tensor and everything that shows it.

A :class:`Source` is one whole tensor whose data live elsewhere. The viewer asks it for a slice, for
statistics or for a reduced overview, and nothing else ever travels. ``ArraySource`` (module
``arrays``) is the same protocol over a numpy array and the oracle of every other implementation;
the reductions it uses are in module ``reduce``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

Index: TypeAlias = "tuple[int | slice, ...]"
"""One entry per dim: an int drops the dim, a slice (step 1 or None) keeps it."""

Span: TypeAlias = "tuple[int, int]"
"""Half-open ``[start, stop)`` in global positions of one dim."""


MAP, STRIP, LINES = "map", "strip", "lines"


@dataclass(frozen=True)
class Piece:
    """A box of the whole tensor that one rank owns.

    ``spans`` has one entry per dim. Several ranks may own the same box (replicas), and one rank may
    own several boxes. ``local`` is where the box starts in the rank's own tensor; empty means at
    its origin, which is right whenever the rank owns a single box. Where the tensor is a sum of what
    ranks hold, ``addend`` counts the summands of the same box; the same one twice is a replica.
    """

    rank: int
    spans: tuple[Span, ...]
    local: tuple[int, ...] = ()
    addend: int = 0


@dataclass(frozen=True)
class Info:
    """Everything about a tensor that is known without touching its data.

    Invariants: ``len(dims) == len(shape)``; every piece has ``len(shape)`` spans inside the shape.
    ``dtype`` is torch's name without the prefix (``"bfloat16"``). ``nbytes`` counts the bytes held
    on the engines, replicas included. ``missing_ranks`` cannot answer: what only they own is a
    hole, never a value. ``partial`` says that the ranks hold summands, not values. ``form`` is how it
    is drawn: as a map, as coloured text (:data:`STRIP`, one dim with labels), or as lines
    (:data:`LINES`, one line per row).
    """

    site: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str
    mesh: str = ""
    placements: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()
    hook: str = ""
    run: str = ""
    step: int | None = None
    nbytes: int = 0
    partial: bool = False
    warnings: tuple[str, ...] = ()
    missing_ranks: tuple[int, ...] = ()
    form: str = MAP

    def __post_init__(self) -> None:
        """Hold the invariants, so that no picture is drawn of an impossible layout."""
        if len(self.dims) != len(self.shape):
            msg = f"{self.site}: {len(self.dims)} dim names {self.dims} for shape {self.shape}"
            raise ValueError(msg)
        for piece in self.pieces:
            if len(piece.spans) != len(self.shape) or any(
                not 0 <= start <= stop <= size
                for (start, stop), size in zip(piece.spans, self.shape, strict=True)
            ):
                msg = f"{self.site}: spans {piece.spans} of rank {piece.rank} outside {self.shape}"
                raise ValueError(msg)


@dataclass(frozen=True)
class Stats:
    """Counts and moments of the whole tensor.

    ``n`` counts the elements that could be reached, finite or not; ``nan + posinf + neginf`` of
    them are not finite. ``min`` to ``std`` (population) are over the finite ones, of the magnitude
    for complex tensors, and NaN where nothing is finite. ``zeros`` counts -0 too. ``masked`` counts the
    elements that somebody masked: they are in nothing else.
    """

    n: int
    nan: int
    posinf: int
    neginf: int
    zeros: int
    min: float
    max: float
    mean: float
    std: float
    masked: int = 0


@dataclass(frozen=True)
class Peak:
    """A value of large magnitude at its global position in the plane; ``value`` in double precision."""

    row: int
    col: int
    value: float


@dataclass(frozen=True)
class Share:
    """What one rank itself holds: its statistics and a histogram.

    ``counts`` (int64) has one entry per bin that was asked for: bin ``i`` counts the finite values in
    ``edges[i] <= x < edges[i + 1]``, the last bin its upper edge too.
    """

    rank: int
    stats: Stats
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Overview:
    """A window of two dims reduced to row bins x column bins.

    With ``R = len(row_edges) - 1`` and ``C = len(col_edges) - 1``, all arrays are ``(R, C)``. Bin
    ``[r, c]`` reduces the elements in ``row_edges[r]:row_edges[r+1], col_edges[c]:col_edges[c+1]``.
    ``n`` (int32) counts the elements that could be reached, so 0 is a hole; ``nan``, ``posinf``,
    ``neginf`` (int32) the ones of them that are not finite. ``mean``, ``rms`` and ``extremum`` (the
    value of largest magnitude with its sign; a tie goes to the positive one) are float32 over the
    finite ones, 0 where there is none, and of the magnitude for complex tensors. Values beyond
    float32 saturate at its largest finite value. ``peaks`` are the finite elements of largest
    magnitude in the window, the largest first, with the exact value and place of each. ``masked`` (int32)
    counts what is masked and therefore in nothing else; None where nothing is.
    """

    row_edges: NDArray[np.int64]
    col_edges: NDArray[np.int64]
    mean: NDArray[np.float32]
    rms: NDArray[np.float32]
    extremum: NDArray[np.float32]
    n: NDArray[np.int32]
    nan: NDArray[np.int32]
    posinf: NDArray[np.int32]
    neginf: NDArray[np.int32]
    peaks: tuple[Peak, ...] = ()
    masked: NDArray[np.int32] | None = None

    @property
    def finite(self) -> NDArray[np.int32]:
        """How many finite elements each bin has, ``(R, C)`` int32."""
        return self.n - self.nan - self.posinf - self.neginf


@runtime_checkable
class Source(Protocol):
    """One whole tensor that can be looked at without being moved.

    Every method may raise :class:`flexmagic.errors.FlexError`; the viewer shows its sentence in
    place and asks again later. Costs are part of the contract: ``read`` moves the bytes of the
    slice, ``overview`` those of ``R x C`` bins per rank, ``stats`` a few numbers per rank.
    """

    @property
    def info(self) -> Info:
        """What is known without data. Asked often: cheap, and fresh as to ``missing_ranks``."""
        ...

    @property
    def bytes_moved(self) -> int:
        """Bytes of data that looking at this tensor has moved so far."""
        ...

    def read(self, index: Index) -> NDArray[Any]:
        """Return a slice of the whole, ``index`` having one int or slice per dim.

        bf16 and fp8 arrive as float32 of the same values, everything else as itself. Elements of
        missing ranks may hold anything: mask them with :func:`flexmagic.view.pieces.present`.
        """
        ...

    def stats(self) -> Stats:
        """Return the statistics of all elements that can be reached."""
        ...

    def overview(
        self,
        rows: int,
        cols: int,
        fixed: dict[int, int],
        row_edges: NDArray[np.int64],
        col_edges: NDArray[np.int64],
    ) -> Overview:
        """Reduce dims ``rows`` x ``cols`` at ``fixed`` (an index for every other dim).

        Edges are global positions, strictly ascending, and may cover a window of the dim. ``rows``
        may come after ``cols``; it is -1 for a tensor of one dim, whose single row has the edges
        ``[0, 1]``.
        """
        ...

    def labels(self, dim: int, fixed: Mapping[int, int] | None = None) -> Sequence[str] | None:
        """Return a text per position of ``dim`` (the tokens of a sequence dim), or None.

        The texts may depend on where one stands in other dims (each row of a batch has its own
        tokens): ``fixed`` says where. They are hostile input: the viewer escapes them.
        """
        ...


@runtime_checkable
class Masked(Protocol):
    """A :class:`Source` of which elements may be masked: shown as such, and in no count or statistic."""

    def masked_at(self, index: Index) -> NDArray[np.bool_] | None:
        """Return which elements of ``read(index)`` are masked, in its shape; None where nothing is."""
        ...


@runtime_checkable
class ByRank(Protocol):
    """A :class:`Source` that can also be looked at rank by rank."""

    def shares(self, edges: NDArray[np.float64]) -> tuple[Share, ...]:
        """Return what each rank that can be reached holds itself, counted into bins between ``edges``.

        A few numbers travel per rank. Of a sum, a rank's share is its own summand.
        """
        ...

    def digests(self) -> dict[int, str]:
        """Return a digest of the bytes of each rank that can be reached: equal ones mean equal bits."""
        ...

    def held(self, rank: int) -> Source:
        """Return what one rank holds as a tensor of its own: its summand, its copy or its piece."""
        ...


class Listener(Protocol):
    """Who wants to know that ranks have ended."""

    def ranks_ended(self, ranks: tuple[int, ...]) -> None:
        """Hear of ranks whose engines have just ended; on a thread of its own."""
        ...


@runtime_checkable
class Mortal(Protocol):
    """A :class:`Source` that lies on processes which may end."""

    def tell_of_endings(self, listener: Listener) -> None:
        """Let ``listener`` know, for as long as it lives, when some of them end."""
        ...


@dataclass(frozen=True)
class Change:
    """How two tensors A and B of the same shape differ, added up over disjoint pieces.

    ``n`` counts the elements compared, ``same`` those with equal bits (NaN with the same NaN too);
    ``largest`` is max|B-A| over those where the difference is finite, NaN where there is none;
    ``odd`` counts the elements that are not both finite and not of equal bits. ``square`` and
    ``base`` are the sums of |B-A|^2 and |A|^2 over the elements finite in both.
    """

    n: int
    same: int
    odd: int
    largest: float
    square: float
    base: float


@runtime_checkable
class Comparable(Protocol):
    """A :class:`Source` that can be compared with some others where their data are."""

    def change_to(self, other: Any) -> Change | None:
        """Return how ``other`` differs from this, counted where the data are; None if that cannot be."""
        ...

    def difference_to(self, other: Any) -> Source | None:
        """Return ``other`` minus this, left where the data are; None if that cannot be."""
        ...
