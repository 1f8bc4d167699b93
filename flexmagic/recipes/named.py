"""Numbers with a name for each dim, as a table has them and as a grid shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError

if TYPE_CHECKING:
    from flexmagic.view.forms import Shown


@dataclass(frozen=True, eq=False)
class Named:
    """Values ``[*dims]``; ``labels``, as ``{"position": ("token", texts)}``, name what is at each place."""

    values: NDArray[Any]
    dims: tuple[str, ...]
    name: str
    labels: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.values.ndim == len(self.dims), (self.values.shape, self.dims)
        for dim, (_, texts) in self.labels.items():
            assert len(texts) == self.values.shape[self.dims.index(dim)], (dim, texts)

    def at(self, **places: int) -> Named:
        """The values at one place along each named dim, without that dim; :class:`InputError` for no such."""
        index: list[Any] = [slice(None)] * len(self.dims)
        for dim, place in places.items():
            if dim not in self.dims:
                raise InputError(f"{self.name} has no dim {dim!r}; it has {', '.join(self.dims)}.")
            size = self.values.shape[self.dims.index(dim)]
            if not -size <= place < size:
                raise InputError(f"{dim} {place} is not there: {self.name} has {size}, counted from 0.")
            index[self.dims.index(dim)] = place
        dims = tuple(dim for dim in self.dims if dim not in places)
        labels = {dim: named for dim, named in self.labels.items() if dim in dims}
        return Named(self.values[tuple(index)], dims, self.name, labels)

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each value, with its place along each dim and the labels: what a data frame takes."""
        out = []
        for place in np.ndindex(*self.values.shape):
            row: dict[str, Any] = {}
            for dim, at in zip(self.dims, place, strict=True):
                row[dim] = at
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
        names = [self.labels[dim][1] if dim in self.labels else None for dim in self.dims]
        rows, cols = self.dims
        return grid(
            self.values, *names, title=title or self.name, dims=(rows, cols), texts=texts, notes=notes
        )

    def __repr__(self) -> str:
        """Name and dims with their sizes."""
        sizes = ", ".join(f"{dim} {size}" for dim, size in zip(self.dims, self.values.shape, strict=True))
        return f"<{self.name} [{sizes}]>"
