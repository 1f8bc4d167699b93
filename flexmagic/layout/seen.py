"""What a survey measures at a site, as plain data: a few hundred bytes per tensor, whatever its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.tensor.placement_types import Placement

from flexmagic.layout.dims import Dim
from flexmagic.layout.layout import Span

TOLERANCE = 1e-4
"""Largest difference of fingerprints of equal tensors, relative to the tensors' norm."""

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Distributed:
    """What a DTensor says of itself, on one rank: ``coordinate`` and ``ranks`` are of its own mesh."""

    placements: tuple[Placement, ...]
    whole: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Seen:
    """What one rank saw at one site in the probe.

    ``fingerprint``: projections of the flattened local tensor on fixed random vectors, ``norm`` its
    Euclidean norm. ``constant``: all elements are equal (or there are none). ``slices``: per dim,
    and per index along it, projections of that slice; empty for long dims. ``by_rows``: whether the
    first half along dim 0 equals the second, as it does where dim 0 counts rows that are the same.
    ``later``: what was seen when the module was called again, the first few times.
    """

    shape: tuple[int, ...]
    dtype: str
    fingerprint: Vector
    norm: float
    constant: bool
    slices: tuple[tuple[Vector, ...], ...] = ()
    by_rows: bool = True
    distributed: Distributed | None = None
    later: tuple[Seen, ...] = ()


@dataclass(frozen=True)
class Probe:
    """What the ranks were given to look at: the data group of every rank, and each group's rows.

    All rows of a group are the same, those of different groups differ. ``seq``: tokens per row.
    """

    groups: tuple[int, ...]
    rows: tuple[int, ...]
    seq: int = 0

    def members(self, group: int, present: Sequence[int]) -> list[int]:
        """The ranks of a data group among those present."""
        return [rank for rank in present if self.groups[rank] == group]

    def shape(self, dims: Sequence[Dim], group: int) -> tuple[int, ...]:
        """The whole shape that a tensor with such dims has in a data group."""
        rows = self.rows[group]
        follow = {"batch": rows, "seq": self.seq}
        return tuple(
            d.size if d.size is not None else follow.get(d.name, rows * (d.per_row or self.seq)) for d in dims
        )


@dataclass(frozen=True)
class WeightSplit:
    """How one weight of a module is split along ``dim``, of the whole length ``whole``.

    ``name``: the parameter's whole name. ``spans``: per rank the global spans that it holds; ``None``
    where that is not known, and empty for a rank that has no such weight. ``why``: what keeps some
    rank's from being known, where that was found.
    """

    module: str
    dim: int
    whole: int
    spans: tuple[tuple[Span, ...] | None, ...]
    name: str = ""
    why: str = ""


def same(a: Seen, b: Seen) -> bool:
    """Whether two local tensors have the same shape and values."""
    return a.shape == b.shape and near(a.fingerprint, b.fingerprint, max(a.norm, b.norm))


def near(a: Vector, b: Vector, norm: float) -> bool:
    """Whether two projections agree, given the norm of what was projected."""
    return all(abs(x - y) <= TOLERANCE * norm for x, y in zip(a, b, strict=True))


def leaders(pieces: Sequence[Seen]) -> list[int]:
    """For each piece the position of the first that is the same."""
    return [next(at for at in range(n + 1) if same(pieces[at], piece)) for n, piece in enumerate(pieces)]
