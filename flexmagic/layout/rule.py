"""How a site lies over the ranks whatever the input: what a survey finds, and a run is held to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from torch.distributed.tensor.placement_types import Placement

from flexmagic.errors import LayoutError
from flexmagic.layout.dims import Dim
from flexmagic.layout.layout import Block, Layout, Span, contiguous_spans
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.placement import Held, along_axes, describe
from flexmagic.layout.sites import Site

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Extent:
    """A forward's input: its rows and tokens per row, ``None`` where that is not known.

    ``shared_out``: whether the data groups have different rows of it, not all the same ones.
    ``past``: tokens per row that came before, of which the model keeps what it computed.
    ``by_row``: what the run gives for each row that the survey did not.
    """

    rows: int | None = None
    seq: int | None = None
    shared_out: bool = True
    past: int = 0
    by_row: tuple[str, ...] = ()

    def fits(self, dim: Dim, length: int) -> bool:
        """Whether a dim of a whole tensor may be so long; where nothing says it, it may.

        What counts tokens may count those that came before too, as keys do.
        """
        if dim.size is not None:
            one_for_all = dim.size == 1 and not self.shared_out  # of a model that now makes one for each row
            return length == dim.size or (one_for_all and length == self.rows)
        if self.seq is not None and dim.name == "seq":
            return length in {self.seq, self.past + self.seq}
        both = None if self.rows is None or self.seq is None else self.rows * self.seq
        return {"batch": self.rows, "batch·seq": both}.get(dim.name) in {None, length}


@dataclass(frozen=True)
class Split:
    """One dim cut into pieces.

    ``place``: the number of the piece that each rank holds, ``None`` for a rank that holds nothing.
    ``spans``: per piece the global spans it covers, where they never change; otherwise the pieces
    follow each other in the order of their numbers, as long as the ranks' tensors are in the run.
    ``rows``: the pieces are the data groups' shares of the batch.
    """

    dim: int
    place: tuple[int | None, ...]
    spans: tuple[tuple[Span, ...], ...] = ()
    rows: bool = False


@dataclass(frozen=True)
class Rule:
    """How one site lies over the mesh for any input: the survey's result.

    ``ranks`` hold it; ``splits`` say along which dims they hold pieces of it, ``addends`` (one
    number per rank, empty for none) that they hold addends of a sum. ``row_addends``: each rank's
    data group, where groups with different rows hold addends, as of the gradient of what all rows
    share. ``together``: what it holds of a row changes with the other rows, or with how many there are.
    ``refused`` is the reason if the whole cannot be established; then nothing else of the
    rule may be used.
    """

    site: Site
    dims: tuple[Dim, ...]
    dtype: str
    mesh: Mesh
    ranks: tuple[int, ...] = ()
    splits: tuple[Split, ...] = field(default=())
    addends: tuple[int, ...] = ()
    row_addends: tuple[int, ...] = ()
    how: str = ""
    refused: str = ""
    together: bool = False

    @property
    def placements(self) -> tuple[Placement | None, ...]:
        """One placement per mesh axis in torch's own words."""
        addends = self._addends(shared_out=True)
        held = [
            Held(
                tuple(self._place(dim, rank) for dim in range(len(self.dims))),
                addends[rank] if addends else 0,
            )
            if rank in self.ranks
            else None
            for rank in range(self.mesh.size)
        ]
        return along_axes(self.mesh, held)

    @property
    def replicated(self) -> bool:
        """Whether every rank that holds the site holds the whole of its data group's rows."""
        return not self.addends and not self.row_addends and all(split.rows for split in self.splits)

    def lies_like(self, other: Rule) -> bool:
        """Whether the other rule joins the ranks' pieces in the same way."""
        mine, its = ((r.ranks, r.splits, r.addends, r.refused) for r in (self, other))
        return mine == its

    def _place(self, dim: int, rank: int) -> tuple[int | None, ...]:
        return tuple(split.place[rank] for split in self.splits if split.dim == dim)

    def _addends(self, *, shared_out: bool) -> tuple[int, ...]:
        """Every rank's addend; those of the data groups count only where groups have different rows."""
        if not (self.row_addends and shared_out):
            return self.addends
        most = max(self.addends, default=0) + 1
        own = self.addends or (0,) * len(self.row_addends)
        return tuple(group * most + addend for group, addend in zip(self.row_addends, own, strict=True))

    def among(self, ranks: Collection[int]) -> Rule:
        """The rule as if only some ranks held the site.

        Raises :class:`LayoutError` if they do not hold the whole of it between them.
        """
        here = tuple(rank for rank in self.ranks if rank in ranks)
        lies = [split.place for split in self.splits] + ([self.addends] if self.addends else [])
        if any({at[rank] for rank in here} != {at[rank] for rank in self.ranks} for at in lies):
            listed = ", ".join(map(str, here))
            msg = f"{self.site}: rank {listed} of this pipeline stage hold only a part of it"
            raise LayoutError(msg)
        return replace(self, ranks=here)

    def moved(self, by: int) -> Rule | None:
        """The rule with so many dims more in front, or fewer if negative; of a batch that is not shared out.

        ``None`` where pieces are made along a dim that goes.
        """
        splits = [split for split in self.splits if not split.rows]
        if by < -len(self.dims) or any(split.dim + by < 0 for split in splits):
            return None
        dims = (Dim("stack"),) * by + self.dims[max(-by, 0) :]
        return replace(self, dims=dims, splits=tuple(replace(s, dim=s.dim + by) for s in splits))

    def local_layout(self, local: Sequence[Shape | None], extent: Extent | None = None) -> Layout:
        """The layout of a real tensor, from every rank's local shape.

        ``extent``: the input it was computed from. Raises :class:`LayoutError` if the site is
        refused or the shapes do not follow the rule.
        """
        extent = extent or Extent()
        if self.refused:
            msg = f"{self.site} is refused: {self.refused}"
            raise LayoutError(msg)
        absent = [str(rank) for rank in self.ranks if local[rank] is None]
        if absent:
            msg = f"{self.site}: rank {', '.join(absent)} never reached this site in this run"
            raise LayoutError(msg)
        if extent.shared_out and extent.by_row and self._one_for_all:
            msg = (
                f"{self.site} is refused in this run: the survey saw one value for all rows here, and with "
                f"{', '.join(extent.by_row)} each data group may have another."
            )
            raise LayoutError(msg)
        splits = [split for split in self.splits if extent.shared_out or not split.rows]
        shape = self._whole(local, splits, extent)
        if shape is None:
            raise LayoutError(self._other(local))
        blocks = tuple(
            self._block(rank, shape, splits, local) if rank in self.ranks else None
            for rank in range(self.mesh.size)
        )
        names = tuple(
            "batch" if d.size == 1 and n > 1 else d.name for d, n in zip(self.dims, shape, strict=True)
        )
        addends = self._addends(shared_out=extent.shared_out)
        return Layout(shape, names, self.dtype, self.mesh, blocks, addends, self.how)

    @property
    def _one_for_all(self) -> bool:
        """Whether the survey saw one value here for all rows."""
        return bool(self.dims) and self.dims[0].size == 1 and not any(split.rows for split in self.splits)

    def _whole(self, local: Sequence[Shape | None], splits: Sequence[Split], extent: Extent) -> Shape | None:
        """The whole's shape, ``None`` if the local shapes do not fit the rule."""
        shapes = {rank: shape for rank in self.ranks if (shape := local[rank]) is not None}
        if any(len(shape) != len(self.dims) for shape in shapes.values()):
            return None
        whole = []
        for at, dim in enumerate(self.dims):
            split = next((s for s in splits if s.dim == at), None)
            lengths = _lengths(split, {rank: shape[at] for rank, shape in shapes.items()})
            if lengths is None:
                return None
            whole.append(sum(lengths))
            if not extent.fits(dim, whole[-1]):
                return None
        return tuple(whole)

    def _block(
        self, rank: int, shape: Shape, splits: Sequence[Split], local: Sequence[Shape | None]
    ) -> Block:
        spans: list[tuple[Span, ...]] = [((0, n),) for n in shape]
        for split in splits:
            lengths = _lengths(split, {r: s[split.dim] for r in self.ranks if (s := local[r]) is not None})
            place = split.place[rank]
            assert lengths is not None  # _whole() has seen that they fit
            assert place is not None  # every rank that holds the site holds a piece
            spans[split.dim] = split.spans[place] if split.spans else contiguous_spans(lengths)[place]
        return tuple(spans)

    def _other(self, local: Sequence[Shape | None]) -> str:
        return (
            f"{self.site}: the ranks' local shapes {list(local)} do not follow the surveyed layout "
            f"({self.describe()}). Load the model again to survey it anew."
        )

    def describe(self) -> str:
        """Named dims and placements in one line."""
        dims = ", ".join(d.name if d.size is None else f"{d.name} {d.size}" for d in self.dims)
        places = ", ".join(
            f"{axis}: {describe(p)}" for axis, p in zip(self.mesh.axes, self.placements, strict=True)
        )
        return f"[{dims}] {places}"


def _lengths(split: Split | None, by_rank: dict[int, int]) -> list[int] | None:
    """The pieces' lengths along a dim in order, ``None`` if ranks with the same piece disagree."""
    if split is None:
        return [next(iter(by_rank.values()))] if len(set(by_rank.values())) == 1 else None
    by_place: dict[int, int] = {}
    for rank, length in by_rank.items():
        place = split.place[rank]
        if place is None or by_place.setdefault(place, length) != length:
            return None
    if sorted(by_place) != list(range(len(by_place))):
        return None
    out = [by_place[place] for place in sorted(by_place)]
    if split.spans and out != [sum(b - a for a, b in split.spans[place]) for place in sorted(by_place)]:
        return None
    return out
