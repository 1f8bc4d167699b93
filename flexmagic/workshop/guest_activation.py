"""A captured tensor as a guest has it: whole to the eye, fetched through the gateway as it is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.layout.assemble import normalise, window_of
from flexmagic.view.source import Info, Overview, Peak, Piece, Share, Stats
from flexmagic.workshop.frames import take

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from flexmagic.workshop.link import Link

AT_ONCE = 16 << 20
"""Bytes that one request asks for."""


class GuestSource:
    """What the viewer asks of a tensor in a workshop; see :class:`~flexmagic.view.source.Source`."""

    def __init__(
        self,
        link: Link,
        where: Mapping[str, Any],
        siblings: Callable[[], dict[str, Callable[[], GuestActivation]]] = dict,
    ) -> None:
        self._link, self._where, self._siblings = link, dict(where), siblings
        self._moved = 0

    @cached_property
    def _said(self) -> dict[str, Any]:
        """What the workshop says of it, asked for when it is first looked at."""
        return self._link.ask("look", **self._where)[0]

    @cached_property
    def _info(self) -> Info:
        return _info(self._said["info"])

    @property
    def site(self) -> str:
        """The site's name."""
        return self._info.site

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._info.shape

    @property
    def dims(self) -> tuple[str, ...]:
        """A name per dim."""
        return self._info.dims

    @property
    def dtype(self) -> str:
        """The tensor's own dtype by torch's name."""
        return self._info.dtype

    @property
    def info(self) -> Info:
        """What is known without touching data."""
        return self._info

    @property
    def bytes_moved(self) -> int:
        """Bytes of data that looking at this has brought to the notebook so far."""
        return self._moved

    def read(self, index: tuple[int | slice, ...]) -> NDArray[Any]:
        """A slice of the whole, one int or slice per dim; what an engine that ended has lost is zeros.

        The viewer marks it as a hole.
        """
        return self._read(index, whole=False)

    def _read(self, index: tuple[int | slice, ...], *, whole: bool) -> NDArray[Any]:
        said = [
            [*part.indices(size)[:2]] if isinstance(part, slice) else int(part) % size
            for part, size in zip(index, self.shape, strict=True)
        ]
        header, frames = self._link.ask("read", index=said, whole=whole, **self._where)
        self._moved += sum(map(len, frames))
        return take(header["array"], frames)

    def stats(self) -> Stats:
        """Counts, extremes, mean and standard deviation of the whole."""
        header, _ = self._link.ask("stats", **self._where)
        return Stats(*header["stats"])

    def overview(
        self,
        rows: int,
        cols: int,
        fixed: dict[int, int],
        row_edges: NDArray[np.int64],
        col_edges: NDArray[np.int64],
    ) -> Overview:
        """Two dims in bins; see :class:`~flexmagic.view.source.Source`."""
        header, frames = self._link.ask(
            "overview", rows=rows, cols=cols, fixed_dims=[int(d) for d in fixed],
            fixed_at=[int(at) for at in fixed.values()], row_edges=row_edges.tolist(),
            col_edges=col_edges.tolist(), **self._where,
        )  # fmt: skip
        self._moved += sum(map(len, frames))
        arrays: dict[str, Any] = {name: take(said, frames) for name, said in header["arrays"].items()}
        return Overview(**arrays, peaks=tuple(Peak(*peak) for peak in header["peaks"]))

    def labels(self, dim: int, fixed: Mapping[int, int] | None = None) -> Sequence[str] | None:
        """The tokens along a ``seq`` dim, of the row at which ``fixed`` holds the ``batch`` dim."""
        texts: list[list[str]] = self._said["tokens"]
        if self.dims[dim] != "seq" or not texts:
            return None
        row = fixed.get(self.dims.index("batch"), 0) if "batch" in self.dims and fixed else 0
        tokens = texts[row] if row < len(texts) else []
        return tokens if len(tokens) == self.shape[dim] else None

    def shares(self, edges: NDArray[np.float64]) -> tuple[Share, ...]:
        """What each rank holds itself, counted into the bins between ``edges``."""
        header, frames = self._link.ask("shares", edges=[float(e) for e in edges], **self._where)
        counts: Any = take(header["counts"], frames)
        return tuple(Share(r, Stats(*s), counts[n]) for n, (r, s) in enumerate(header["shares"]))

    def digests(self) -> dict[int, str]:
        """A digest of the bytes of each rank."""
        header, _ = self._link.ask("digests", **self._where)
        return {int(rank): str(digest) for rank, digest in header["digests"]}


class GuestActivation(GuestSource):
    """One whole tensor of a run in a workshop.

    Holding it costs nothing: what indexing, :meth:`numpy` and the viewer show is what travels.
    """

    def __getitem__(self, index: object) -> NDArray[Any]:
        """A part of the whole by ints, slices and ``...``; only that part travels.

        bf16 and fp8 come as float32 of the same values. Raises :class:`InputError` for any other index.
        """
        window, rest = window_of(normalise(index, self.shape), self.shape)
        values = self._fetch(tuple(slice(start, stop) for start, stop in window))
        for dim, part in enumerate(rest):
            if isinstance(part, slice) and part.step:
                values = values.take(range(values.shape[dim])[:: part.step], dim)
        return np.asarray(values[tuple(0 if isinstance(part, int) else slice(None) for part in rest)])

    def numpy(self) -> NDArray[Any]:
        """The whole tensor as an array; bf16 and fp8 become float32 of the same values."""
        if "_said" in self.__dict__:
            return self[...]
        self._said, frames = self._link.ask("look", values=True, **self._where)
        if "array" not in self._said:
            return self[...]
        self._moved += sum(map(len, frames))
        return take(self._said["array"], frames)

    def torch(self) -> Tensor:
        """The whole tensor on the CPU, in its own dtype."""
        import torch

        return torch.from_numpy(self.numpy().copy()).to(getattr(torch, self.dtype))

    def _fetch(self, index: tuple[slice, ...]) -> NDArray[Any]:
        """A slice, in requests of a bounded size."""
        sizes = [part.stop - part.start for part in index]
        if not math.prod(sizes) * 8 > AT_ONCE or max(sizes) < 2:
            return self._read(index, whole=True)
        dim = next(at for at, size in enumerate(sizes) if size > 1)
        middle = index[dim].start + sizes[dim] // 2
        halves = [slice(index[dim].start, middle), slice(middle, index[dim].stop)]
        return np.concatenate([self._fetch((*index[:dim], half, *index[dim + 1 :])) for half in halves], dim)

    def held(self, rank: int) -> GuestActivation:
        """What one rank holds as a tensor of its own."""
        return GuestActivation(self._link, {**self._where, "rank": rank})

    # display

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained HTML page; written to ``path`` if given."""
        from flexmagic.view.html import to_html

        return to_html(self, path)

    def table(self) -> Any:
        """Statistics and histograms by rank and of the whole."""
        from flexmagic.view.table import rank_table

        return rank_table(self)

    def __repr__(self) -> str:
        """Site, shape, dtype, layout and the hooks that acted before: no data is fetched."""
        return str(self._said["text"])

    def _ipython_display_(self) -> None:
        from flexmagic.view.display import show

        siblings = self._siblings()
        show(self, siblings or None, self.site if self.site in siblings else None)


def _info(said: Mapping[str, Any]) -> Info:
    pieces = tuple(
        Piece(rank, tuple((a, b) for a, b in spans), tuple(local), addend)
        for rank, spans, local, addend in said["pieces"]
    )
    listed = ("shape", "dims", "placements", "warnings", "missing_ranks")
    facts: dict[str, Any] = {name: tuple(value) if name in listed else value for name, value in said.items()}
    if math.prod(facts["shape"]) < 0:
        raise InputError("The workshop described a tensor that there cannot be.")
    return Info(**(facts | {"pieces": pieces}))
