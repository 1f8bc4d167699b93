"""Which rank owns which part of a whole tensor."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch.distributed.tensor.placement_types import Placement

from flexmagic.layout.mesh import Mesh
from flexmagic.layout.placement import Held, along_axes, describe

Span = tuple[int, int]
"""A half-open global range ``[start, stop)`` along one dim."""

Block = tuple[tuple[Span, ...], ...]
"""A rank's part: for every dim the global spans it holds, in the order in which it holds them."""


@dataclass(frozen=True)
class Layout:
    """A whole tensor and where its parts are.

    ``shape`` and ``dims`` (names) have one entry per dim, ``blocks`` one per rank, ``None`` where a
    rank holds nothing. A rank's local tensor has, along each dim, the total length of its spans.
    ``addends``: one number per rank where the tensor is a sum of what ranks hold; empty where it is
    not. Ranks with equal blocks and equal addends are replicas of each other.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    dtype: str
    mesh: Mesh
    blocks: tuple[Block | None, ...]
    addends: tuple[int, ...] = ()
    how: str = ""

    @property
    def placements(self) -> tuple[Placement | None, ...]:
        """One placement per mesh axis in torch's own words, read off the blocks."""
        held = [
            None if block is None else Held(block, self.addend(rank))
            for rank, block in enumerate(self.blocks)
        ]
        return along_axes(self.mesh, held)

    def addend(self, rank: int) -> int:
        """Which addend of the sum a rank holds; 0 where the tensor is no sum."""
        return self.addends[rank] if self.addends else 0

    @property
    def partial(self) -> bool:
        """Whether ranks with the same block hold addends of a sum."""
        return bool(self.addends)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that hold anything."""
        return tuple(rank for rank, block in enumerate(self.blocks) if block is not None)

    @property
    def replicated(self) -> bool:
        """Whether every rank that holds anything holds the whole tensor."""
        return not self.partial and all(self.blocks[rank] == self.whole_block for rank in self.ranks)

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
        seen: set[tuple[Block, int]] = set()
        out = []
        for rank, block in enumerate(self.blocks):
            if block is None or rank in without or (block, self.addend(rank)) in seen:
                continue
            seen.add((block, self.addend(rank)))
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


def contiguous_spans(sizes: list[int]) -> list[tuple[Span, ...]]:
    """The spans of pieces that lie one after the other, one tuple per piece."""
    out: list[tuple[Span, ...]] = []
    at = 0
    for n in sizes:
        out.append(((at, at + n),))
        at += n
    return out
