"""Numbers with a name for each dim, as a table has them and as a grid shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError

if TYPE_CHECKING:
    from flexmagic import Shown


@dataclass(frozen=True, eq=False)
class Named:
    """Values ``[*dims]``; ``labels``, as ``{"position": ("token", texts)}``, name what is at each place.

    ``numbers``: of the places along a dim, such as ``{"layer": (2, 3)}``, where they are not 0, 1 and so on.
    """

    values: NDArray[Any]
    dims: tuple[str, ...]
    name: str
    labels: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    numbers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.values.ndim == len(self.dims), (self.values.shape, self.dims)
        each = {dim: texts for dim, (_, texts) in self.labels.items()}
        for dim, named in (*each.items(), *self.numbers.items()):
            assert len(named) == self.values.shape[self.dims.index(dim)], (dim, named)

    def at(self, **places: int) -> Named:
        """The values at one place along each named dim, by its number, without that dim.

        Raises :class:`InputError` for a dim or place that is not there.
        """
        index: list[Any] = [slice(None)] * len(self.dims)
        for dim, place in places.items():
            if dim not in self.dims:
                raise InputError(f"{self.name} has no dim {dim!r}; it has {', '.join(self.dims)}.")
            there = list(self.numbers.get(dim, range(self.values.shape[self.dims.index(dim)])))
            if place not in there and (dim in self.numbers or not -len(there) <= place < 0):
                raise InputError(f"{dim} {place} is not there: {self.name} has {there[0]} to {there[-1]}.")
            index[self.dims.index(dim)] = there.index(place) if place in there else place
        dims = tuple(dim for dim in self.dims if dim not in places)
        labels = {dim: named for dim, named in self.labels.items() if dim in dims}
        numbers = {dim: named for dim, named in self.numbers.items() if dim in dims}
        return Named(self.values[tuple(index)], dims, self.name, labels, numbers)

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each value, with its place along each dim and the labels: what a data frame takes."""
        out = []
        for place in np.ndindex(*self.values.shape):
            row: dict[str, Any] = {}
            for dim, at in zip(self.dims, place, strict=True):
                row[dim] = self.numbers[dim][at] if dim in self.numbers else at
                if dim in self.labels:
                    what, texts = self.labels[dim]
                    row[what] = texts[at]
            row[self.name] = self.values[place].item()
            out.append(row)
        return out

    def grid(self, title: str = "", *, texts: Any = None, notes: Any = None) -> Shown:
        """The viewer's grid of values with two dims; see :func:`flexmagic.grid`."""
        from flexmagic import grid

        if len(self.dims) != 2:
            raise InputError(f"A grid has two dims; {self.name} has {', '.join(self.dims)}: use .at(dim=…).")
        names = [self._names(dim) for dim in self.dims]
        rows, cols = self.dims
        return grid(
            self.values, *names, title=title or self.name, dims=(rows, cols), texts=texts, notes=notes
        )

    def _names(self, dim: str) -> list[str] | None:
        """What the grid writes beside the places along a dim."""
        if dim in self.labels:
            return list(self.labels[dim][1])
        return [f"{dim} {number}" for number in self.numbers[dim]] if dim in self.numbers else None

    def __repr__(self) -> str:
        """Name and dims with their sizes."""
        sizes = ", ".join(f"{dim} {size}" for dim, size in zip(self.dims, self.values.shape, strict=True))
        return f"<{self.name} [{sizes}]>"
