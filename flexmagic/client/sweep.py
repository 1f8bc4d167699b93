"""One trace run for each combination of some values, and what each saved, as grids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from flexmagic.client.run import Run

Over = Mapping[str, Sequence[Any]]
"""Values by name, such as ``{"layer": range(4), "position": range(7)}``."""


def combinations(over: Over) -> Iterator[dict[str, Any]]:
    """Each combination, the last name changing fastest; :class:`InputError` for a name without values."""
    for name, values in over.items():
        if not hasattr(values, "__len__") or not len(values):
            raise InputError(f"{name} needs a list of one value or more, such as {name}=range(4).")
    yield from (dict(zip(over, values, strict=True)) for values in itertools.product(*over.values()))


class Sweep:
    """The runs of one sweep: ``sweep["p"]`` is what each saved as ``p``, one dim per name in front."""

    def __init__(self, over: Over, runs: Sequence[Run]) -> None:
        self.over = {name: list(values) for name, values in over.items()}
        self.runs = list(runs)

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of values of each name."""
        return tuple(len(values) for values in self.over.values())

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        """What the runs saved under a name, ``[*shape, *the value's own shape]``, as float32 for bf16.

        Raises :class:`InputError` for a name that some run did not save, or not as numbers of one shape.
        """
        import numpy as np
        import torch

        values = []
        for run in self.runs:
            if name not in run.context:
                had = ", ".join(run.context) or "nothing"
                raise InputError(f"No value {name!r} was saved in {run}; it saved {had}.")
            value = run.context[name]
            if isinstance(value, torch.Tensor):
                value = value.detach().cpu()
                value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
            values.append(np.asarray(value))
        if len({value.shape for value in values}) > 1:
            raise InputError(
                f"The runs saved {name!r} in different shapes, which make no grid; see sweep.runs."
            )
        return np.stack(values).reshape(*self.shape, *values[0].shape)

    def __repr__(self) -> str:
        """The names and how many values each had."""
        sizes = " × ".join(f"{len(values)} {name}" for name, values in self.over.items())
        return f"<Sweep over {sizes}: {len(self.runs)} runs>"
