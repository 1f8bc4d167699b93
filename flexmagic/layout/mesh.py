"""The device mesh as a value: named axes, their sizes, and each rank's coordinate."""

from __future__ import annotations

import math
from dataclasses import dataclass


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

    def __str__(self) -> str:
        """Axes and sizes as a person writes them: ``tp=2`` or ``dp=2 × tp=4``."""
        return " × ".join(f"{axis}={n}" for axis, n in zip(self.axes, self.shape, strict=True))
