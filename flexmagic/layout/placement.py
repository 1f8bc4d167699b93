"""What a rank's part of a tensor looks like from a mesh axis: torch's placements, read off the parts."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from flexmagic.layout.mesh import Mesh


@dataclass(frozen=True)
class Held:
    """What one rank holds: an identity of its part along every dim, and which addend of a sum it is."""

    along: tuple[Hashable, ...]
    addend: int = 0


def along_axes(mesh: Mesh, held: Sequence[Held | None]) -> tuple[Placement | None, ...]:
    """One placement per mesh axis; ``None`` for an axis along which only one rank holds anything.

    ``held`` has one entry per rank, ``None`` where a rank holds nothing. A tensor of which one axis
    cuts several dims is described by the first of them.
    """
    return tuple(_along(mesh, axis, held) for axis in range(len(mesh.axes)))


def _along(mesh: Mesh, axis: int, held: Sequence[Held | None]) -> Placement | None:
    if mesh.shape[axis] == 1:
        return Replicate()
    met = False
    for a, b in _neighbours(mesh, axis, held):
        met = True
        for dim, (x, y) in enumerate(zip(a.along, b.along, strict=True)):
            if x != y:
                return Shard(dim)
        if a.addend != b.addend:
            return Partial()
    return Replicate() if met else None


def _neighbours(mesh: Mesh, axis: int, held: Sequence[Held | None]) -> Iterator[tuple[Held, Held]]:
    """The first rank of every line along an axis with each other rank of it, where both hold something."""
    for line in mesh.lines(axis):
        here = [part for rank in line if (part := held[rank]) is not None]
        yield from ((here[0], other) for other in here[1:])


def cut_order(placements: Sequence[Placement], mesh_shape: Sequence[int]) -> dict[int, list[int]] | None:
    """By dim, the mesh axes that cut it, in the order in which they do; ``None`` if they do not say so.

    Usually the outer axis cuts first. Sharding on top of tensor parallelism cuts what a later axis
    leaves; torch then notes into how many pieces the dim was cut before.
    """
    order: dict[int, list[int]] = {}
    for axis in reversed(range(len(placements))):
        cut = dim_cut(placements[axis])
        if cut is None:
            continue
        axes = order.setdefault(cut, [])
        if cut in grouped_cuts(placements):
            axes.append(axis)
            continue
        wanted = getattr(placements[axis], "split_factor", 1)
        before = [math.prod(mesh_shape[a] for a in axes[:at]) for at in range(len(axes) + 1)]
        if wanted not in before:
            return None
        axes.insert(before.index(wanted), axis)
    return order


def grouped_cuts(placements: Sequence[Placement]) -> dict[int, int]:
    """By dim that only one axis cuts: into how many groups it was cut before, if there are several.

    A rank then holds its piece of every group, as of the two projections fused into one weight.
    """
    cuts = [dim_cut(placement) for placement in placements]
    factors = {cut: getattr(p, "split_factor", 1) for p, cut in zip(placements, cuts, strict=True)}
    return {dim: n for dim, n in factors.items() if dim is not None and n > 1 and cuts.count(dim) == 1}


def dim_cut(placement: Placement) -> int | None:
    """The dim that a shard cuts; ``None`` for anything but a plain or a strided shard."""
    if type(placement) is Shard or type(placement).__name__ == "_StridedShard":
        return cast("Shard", placement).dim
    return None


def describe(placement: Placement | None) -> str:
    """A placement in torch's words, stable over torch's own changes of ``repr``."""
    if isinstance(placement, Shard):
        return f"Shard(dim={placement.dim})"
    if isinstance(placement, Replicate):
        return "Replicate"
    if placement is None:
        return "on one stage"
    return "Partial(sum)" if isinstance(placement, Partial) else str(placement)
