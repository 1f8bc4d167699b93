"""Which rank owns which part of a whole tensor."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from flexmagic.layout.mesh import Mesh

Span = tuple[int, int]
"""A half-open global range ``[start, stop)`` along one dim."""

Block = tuple[tuple[Span, ...], ...]
"""A rank's part: for every dim the global spans it holds, in the order in which it holds them."""


@dataclass(frozen=True)
class Layout:
    """A whole tensor and where its parts are.

    ``shape`` and ``dims`` (names) have one entry per dim; ``placements`` one per mesh axis, in
    torch's own words; ``blocks`` one per rank, ``None`` where a rank holds nothing. A rank's local
    tensor has, along each dim, the total length of its spans. Ranks with equal blocks are replicas
    of each other, or, under ``Partial``, addends of one sum.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str
    mesh: Mesh
    placements: tuple[Placement, ...]
    blocks: tuple[Block | None, ...]
    how: str = ""

    @property
    def partial(self) -> bool:
        """Whether ranks with the same block hold addends of a sum."""
        return any(isinstance(p, Partial) for p in self.placements)

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the whole tensor."""
        return not self.partial and all(block == self.whole_block for block in self.blocks)

    @property
    def whole_block(self) -> Block:
        """The block that covers everything."""
        return tuple(((0, n),) for n in self.shape)

    @property
    def numel(self) -> int:
        """The number of elements of the whole tensor."""
        return math.prod(self.shape)

    def local_shape(self, rank: int) -> tuple[int, ...] | None:
        """The shape of the rank's local tensor; ``None`` where it holds nothing."""
        block = self.blocks[rank]
        if block is None:
            return None
        return tuple(sum(stop - start for start, stop in spans) for spans in block)

    def owners(self, without: Collection[int] = ()) -> tuple[int, ...]:
        """The ranks to ask for the whole: one of each set of replicas, every addend of a sum.

        ``without``: ranks that cannot be asked; another replica stands in where there is one.
        """
        seen: set[Block] = set()
        out = []
        for rank, block in enumerate(self.blocks):
            if block is None or rank in without or (block in seen and not self.partial):
                continue
            seen.add(block)
            out.append(rank)
        return tuple(out)

    def describe_shape(self) -> str:
        """``batch 1 × seq 7 × feature 256``."""
        if not self.shape:
            return "a single number"
        return " × ".join(f"{name} {n}" for name, n in zip(self.dims, self.shape, strict=True))

    def describe_placements(self) -> tuple[str, ...]:
        """``("tp: Shard(dim=2)",)``: one text per mesh axis."""
        return tuple(
            f"{axis}: {describe(placement)}"
            for axis, placement in zip(self.mesh.axes, self.placements, strict=True)
        )


def describe(placement: Placement) -> str:
    """A placement in torch's words, stable over torch's own changes of ``repr``."""
    if isinstance(placement, Shard):
        return f"Shard(dim={placement.dim})"
    if isinstance(placement, Replicate):
        return "Replicate"
    return "Partial(sum)" if isinstance(placement, Partial) else str(placement)


def contiguous_spans(sizes: list[int]) -> list[tuple[Span, ...]]:
    """The spans of pieces that lie one after the other, one tuple per piece."""
    out: list[tuple[Span, ...]] = []
    at = 0
    for n in sizes:
        out.append(((at, at + n),))
        at += n
    return out
