"""The device mesh as a value: named axes, their sizes, and each rank's coordinate."""

from __future__ import annotations

import math
from dataclasses import dataclass

AXES = ("pp", "dp", "fsdp", "tp")
"""The axes a model can be asked to be split over, outermost first."""


DATA_AXES = frozenset({"dp", "fsdp", "dp_replicate", "dp_shard", "hsdp"})
"""Mesh axes along which ranks hold different rows, by the names that are usual for them."""


@dataclass(frozen=True)
class Mesh:
    """Named axes over the ranks 0..size-1, ranks counted in row-major order.

    ``axes`` and ``shape`` have one entry per axis, outermost first.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or not self.axes:
            msg = f"a mesh needs one size per axis, got axes {self.axes} and shape {self.shape}"
            raise ValueError(msg)

    @classmethod
    def of(cls, **sizes: int) -> Mesh:
        """The mesh of the usual axes with these sizes; axes of one rank are left out."""
        found = {axis: sizes[axis] for axis in AXES if sizes.get(axis, 1) > 1} or {"tp": 1}
        return cls(tuple(found), tuple(found.values()))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return math.prod(self.shape)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """The rank's index along every axis, outermost first."""
        out = []
        for n in reversed(self.shape):
            rank, index = divmod(rank, n)
            out.append(index)
        return tuple(reversed(out))

    def lines(self, axis: int) -> list[tuple[int, ...]]:
        """The ranks that differ only in their index along an axis, one tuple per line."""
        lines: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            at = self.coordinate(rank)
            lines.setdefault((*at[:axis], *at[axis + 1 :]), []).append(rank)
        return [tuple(line) for line in lines.values()]

    def __str__(self) -> str:
        """Axes and sizes as a person writes them: ``tp=2`` or ``dp=2 × tp=4``."""
        return " × ".join(f"{axis}={n}" for axis, n in zip(self.axes, self.shape, strict=True))
