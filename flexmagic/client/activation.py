"""The notebook's handle to a captured activation: whole to the eye, in pieces on the engines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.client.looks import Looks
from flexmagic.errors import SiteError
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from flexmagic.client.calls import Calls
    from flexmagic.client.wire import Arriving
    from flexmagic.engine.captures import RunKey
    from flexmagic.layout.assemble import Read
    from flexmagic.layout.heads import Heads
    from flexmagic.layout.layout import Layout
    from flexmagic.view.source import Info, Overview, Stats


@dataclass(frozen=True)
class Origin:
    """Which run a capture belongs to and what is known of it beside its layout."""

    run: RunKey
    site: Site
    after: tuple[str, ...]
    before: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    nbytes: int
    lives: tuple[int, ...]
    warnings: tuple[str, ...] = ()


Siblings = Callable[[], "dict[str, Callable[[], Activation]]"]
"""What returns the same site in other layers of a run, by name, each to be opened when it is chosen."""

Steps = Callable[[], tuple[str | None, dict[str, Siblings]]]
"""What returns the name of an activation's step in its run, and the same for each step that has the site."""


class Activation(Looks):
    """One whole tensor that a run left on the engines in pieces.

    Holding it costs nothing; indexing, :meth:`numpy` and the viewer fetch what they show and no
    more. Values are those of the tensor after all hooks of its site, which ``after`` names in their
    order: ``("damp v1",)``. ``before``: the hooks that acted here later, of a value captured between hooks.
    """

    def __init__(
        self,
        calls: Calls,
        origin: Origin,
        layout: Layout,
        siblings: Siblings,
        steps: Steps = lambda: (None, {}),
    ) -> None:
        self._calls = calls
        self._origin = origin
        self._siblings = siblings
        self._steps = steps
        self._moved = 0
        self.after = origin.after
        self.before = origin.before
        self.layout = layout

    @property
    def site(self) -> str:
        """The site's name, e.g. ``model.layers.3.mlp:output``."""
        return str(self._origin.site)

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self.layout.shape

    @property
    def dims(self) -> tuple[str, ...]:
        """A name per dim, e.g. ``("batch", "seq", "hidden")``."""
        return self.layout.dims

    @property
    def dtype(self) -> str:
        """The tensor's own dtype by torch's name, e.g. ``"bfloat16"``."""
        return self.layout.dtype

    def of_heads(self, heads: Heads, name: Site) -> Activation:
        """The heads in this activation's features, ``[..., heads, head_dim]``, under a name of their own.

        Raises :class:`LayoutError` if a rank holds only a part of a head.
        """
        layout = heads.layout(self.layout)
        seen = replace(name, leaf=f"{name.leaf}{self._origin.site.leaf.partition('@')[2]}")
        requests: dict[int, tuple[str, Any, Any]] = {}
        for rank in self.layout.ranks:
            block = self.layout.blocks[rank]
            assert block is not None  # it is one of the ranks
            args = (self._origin.run, (self._origin.site, seen), heads, block[-1])
            requests[rank] = ("take_heads", args, {})
        self._calls.some(requests)
        return Activation(self._calls, replace(self._origin, site=seen), layout, dict)

    def __getitem__(self, index: object) -> NDArray[Any]:
        """A part of the whole by ints, slices and ``...``; only that part travels.

        Returns an array of the indexed shape, dtype as :meth:`numpy` gives it. Raises
        :class:`~flexmagic.errors.InputError` for any other index, and
        :class:`~flexmagic.errors.ClusterError` if a rank that alone holds some of it is gone.
        """
        from flexmagic.engine.look import as_array

        with self._calls.arriving(self.site, None) as progress:
            return as_array(self._read(index, progress=progress))

    def numpy(self, progress: Arriving | None = None) -> NDArray[Any]:
        """The whole tensor as an array; bf16 and fp8 become float32 of the same values.

        Ranks of this machine write it into memory that is then the array's own, others send it in
        messages of a bounded size. ``progress`` hears how many bytes have come, of how many; without
        it, a notebook shows that once it takes over a second. An interrupt ends it.
        """
        from flexmagic.engine.look import as_array

        with self._calls.arriving(self.site, progress) as heard:
            return as_array(self._read(..., progress=heard))

    def torch(self, progress: Arriving | None = None) -> Tensor:
        """The whole tensor in its own dtype, on the CPU; it comes as in :meth:`numpy`."""
        with self._calls.arriving(self.site, progress) as heard:
            return self._read(..., progress=heard)

    def _read(self, index: object, *, holes: bool = False, progress: Arriving | None = None) -> Tensor:
        from flexmagic.layout.assemble import normalise, window_of

        window, rest = window_of(normalise(index, self.shape), self.shape)
        tensor = self._window(window, holes=holes, progress=progress)
        steps = [(dim, part.step) for dim, part in enumerate(rest) if isinstance(part, slice) and part.step]
        for dim, step in steps:
            tensor = tensor.index_select(dim, _as_index(range(tensor.shape[dim])[::step]))
        return tensor[tuple(0 if isinstance(part, int) else slice(None) for part in rest)]

    def _window(
        self, window: tuple[tuple[int, int], ...], *, holes: bool, progress: Arriving | None = None
    ) -> Tensor:
        import torch

        from flexmagic.client.wire import Line, fetch, nbytes

        dtype, shape = getattr(torch, self.dtype), tuple(stop - start for start, stop in window)
        reads = self._reads(window, holes=holes)
        turn = self._calls.ranks.cluster.turns.turn
        line = Line(
            self._ask,
            lambda rank, reader: self._calls.post(rank, "give_back", reader),
            turn,
            self._calls.unreachable,
        )
        out = fetch(line, reads, shape, dtype, add=self.layout.partial, progress=progress)
        self._moved += sum(nbytes(read.local, dtype.itemsize) for read in reads)
        return out

    def _reads(self, window: tuple[tuple[int, int], ...], *, holes: bool) -> list[Read]:
        """The slices that cover a window; with ``holes``, only those that can still be had."""
        from flexmagic.layout.assemble import plan_read

        gone = self._calls.gone(self._origin.lives)
        owners = self.layout.owners(without=gone)
        lost = {self.layout.blocks[r] for r in gone} - {self.layout.blocks[r] for r in owners}
        if not holes and (lost or (gone and self.layout.partial)):
            self._refuse_lost(gone)
            owners = self.layout.owners()  # asking the rank that is gone says so
        return plan_read(self.layout, window, owners)

    def _refuse_lost(self, gone: Sequence[int]) -> None:
        again = [rank for rank in gone if rank not in self._calls.ended()]
        if again:
            ranks = ", ".join(map(str, again))
            msg = f"The part of {self.site} that rank {ranks} held was lost when its engine ended. Run again."
            raise SiteError(msg)

    def _ask(self, verb: str, reads: Sequence[Read], parts: Sequence[Any], *more: Any) -> list[Any]:
        """Send each read's part to its rank, one call per rank; answers in the order of the reads."""
        by_rank: dict[int, list[int]] = {}
        for at, read in enumerate(reads):
            by_rank.setdefault(read.rank, []).append(at)
        run, site = self._origin.run, self._origin.site
        answers = self._calls.some(
            {
                rank: (verb, (run, site, [parts[at] for at in mine], *more), {})
                for rank, mine in by_rank.items()
            }
        )
        out: list[Any] = [None] * len(reads)
        for rank, mine in by_rank.items():
            for at, answer in zip(mine, answers[rank], strict=True):
                out[at] = answer
        return out

    # the viewer's seam (flexmagic.view.source.Source)

    @property
    def info(self) -> Info:
        """What is known without touching data."""
        from flexmagic.view.source import Info

        return Info(
            site=self.site,
            shape=self.shape,
            dims=self.dims,
            dtype=self.dtype,
            mesh=str(self.layout.mesh),
            placements=self.layout.describe_placements(),
            pieces=_pieces(self.layout),
            hook=self._place(),
            run=f"run {self._origin.run[1]}",
            step=self._origin.run[2] if len(self._origin.run) == 3 else None,
            nbytes=self._origin.nbytes,
            partial=self.layout.partial,
            warnings=self._origin.warnings,
            missing_ranks=self._calls.gone(self._origin.lives),
        )

    @property
    def bytes_moved(self) -> int:
        """Bytes of data that looking at this activation has brought to the notebook so far."""
        return self._moved

    def read(self, index: tuple[int | slice, ...]) -> NDArray[Any]:
        """As indexing, for the viewer: what only a rank that is gone holds is left as zeros.

        The viewer marks it as a hole; see :class:`Source`.
        """
        from flexmagic.engine.look import as_array

        return as_array(self._read(index, holes=not self.layout.partial))

    def stats(self) -> Stats:
        """Counts, extremes, mean and standard deviation of the whole, merged from the ranks' own.

        Without what only a rank that is gone holds: ``n`` then counts what could be reached.
        """
        from flexmagic.view.reduce import compute_stats, merge_stats

        if self.layout.partial:
            return compute_stats(self.numpy(), self.masked_at((slice(None),) * len(self.shape)))
        reads = self._reads(tuple((0, n) for n in self.shape), holes=True)
        return merge_stats(self._ask(*self._counting(reads)))

    def _counting(self, reads: Sequence[Read]) -> tuple[str, Sequence[Read], list[Any]]:
        """What is asked for statistics of reads of the whole: a verb, the reads, what it gets of each."""
        return "stats", reads, [read.local for read in reads]

    def overview(
        self,
        rows: int,
        cols: int,
        fixed: dict[int, int],
        row_edges: NDArray[np.int64],
        col_edges: NDArray[np.int64],
    ) -> Overview:
        """Two dims reduced to bins, each rank reducing its own part; see :class:`Source`."""
        from flexmagic.engine.look import Window
        from flexmagic.view.reduce import merge_overviews, reduce_overview

        window = Window(rows, cols, dict(fixed), row_edges, col_edges)
        bounds = window.bounds(len(self.shape))
        if self.layout.partial:
            index = tuple(fixed[d] if d in fixed else slice(*bounds[d]) for d in range(len(self.shape)))
            values, masked = (
                None if part is None else part[None] if rows < 0 else part.T if rows > cols else part
                for part in (self[index], self.masked_at(index))
            )
            assert values is not None  # it was read
            origin = int(row_edges[0]), int(col_edges[0])
            return reduce_overview(values, row_edges - origin[0], col_edges - origin[1], origin, masked)
        verb, reads, args = self._reducing(self._reads(bounds, holes=True), bounds)
        by_rank: dict[int, list[Any]] = {}
        for read, arg in zip(reads, args, strict=True):
            by_rank.setdefault(read.rank, []).append(arg)
        key = self._origin.run, self._origin.site
        asked: dict[int, Any] = {rank: (verb, (*key, mine, window), {}) for rank, mine in by_rank.items()}
        parts = list(self._calls.some(asked).values()) if asked else []
        self._moved += sum(part.mean.nbytes * 7 for part in parts)
        nothing = reduce_overview(np.zeros((0, 0)), row_edges * 0, col_edges * 0)
        return replace(merge_overviews(parts or [nothing]), row_edges=row_edges, col_edges=col_edges)

    def _reducing(
        self, reads: Sequence[Read], bounds: tuple[tuple[int, int], ...]
    ) -> tuple[str, Sequence[Read], list[Any]]:
        """As :meth:`_counting`, of an overview of the window ``bounds``."""
        del bounds
        return "overview", reads, [(read.local, read.result) for read in reads]

    def masked_at(self, index: tuple[int | slice, ...]) -> NDArray[np.bool_] | None:
        """Which elements of ``read(index)`` are masked; ``None``: none is, see :meth:`masked`."""
        del index
        return None

    def labels(self, dim: int, fixed: Mapping[int, int] | None = None) -> Sequence[str] | None:
        """The tokens along a ``seq`` dim, of the row at which ``fixed`` holds the ``batch`` dim."""
        if self.dims[dim] != "seq" or not self._origin.tokens:
            return None
        row = 0
        if "batch" in self.dims and fixed:
            row = fixed.get(self.dims.index("batch"), 0)
        tokens = self._origin.tokens[row] if row < len(self._origin.tokens) else ()
        return tokens if len(tokens) == self.shape[dim] else None

    # display

    def __repr__(self) -> str:
        """Site, shape, dtype, layout and the hooks that acted before: no data is fetched."""
        places = ", ".join(self.layout.describe_placements())
        hooks = f", {self._place()}" if self._place() else ""
        return f"<Activation {self.site} [{self.layout.describe_shape()}] {self.dtype}, {places}{hooks}>"

    def _place(self) -> str:
        """``after a v1, before b v2``."""
        sides = (("after", self.after), ("before", self.before))
        return ", ".join(f"{side} {', '.join(hooks)}" for side, hooks in sides if hooks)

    def _ipython_display_(self) -> None:
        from flexmagic.view.display import show

        siblings = self._siblings()
        own = self.site if self.site in siblings else None
        step, steps = self._steps()
        show(self, siblings or None, own, steps, step)


def _as_index(picked: range) -> Tensor:
    import torch

    return torch.tensor(list(picked), dtype=torch.int64)


def _pieces(layout: Layout) -> tuple[Any, ...]:
    from flexmagic.view.source import Piece

    out = []
    for rank, block in enumerate(layout.blocks):
        if block is None:
            continue
        starts = [list(itertools.accumulate((b - a for a, b in spans), initial=0))[:-1] for spans in block]
        for spans, local in zip(itertools.product(*block), itertools.product(*starts), strict=True):
            out.append(Piece(rank, tuple(spans), tuple(local), layout.addend(rank)))
    return tuple(out)
