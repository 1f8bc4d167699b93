"""One trace run for each combination of some values, and what each saved, as grids."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError
from flexmagic.layout.sites import Site, layer_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from flexmagic.client.run import Run
    from flexmagic.layout.rule import Rule

MEMORY = 64 << 20
"""Bytes that the traces of one forward take on a rank, as estimated; more gave no more speed on a CPU."""

ENOUGH = 16
"""So many traces make up for the fixed cost of a forward; it has no more values of the first names then."""

ONE_FORWARD = ("seed", "progress", "limit", "first_line", "only", "without")
"""Options that traces may share one forward with."""

SAME = 1e-5
"""Largest difference, relative to the largest value, of a trace's values alone and among others."""

Over = Mapping[str, Sequence[Any]]
"""Values by name, such as ``{"layer": range(4), "position": range(7)}``."""

Cell = dict[str, Any]
"""One value of each name, and what all traces are given."""


def combinations(over: Over) -> Iterator[dict[str, Any]]:
    """Each combination, the last name changing fastest; :class:`InputError` for a name without values."""
    for name, values in over.items():
        if not hasattr(values, "__len__") or not len(values):
            raise InputError(f"{name} needs a list of one value or more, such as {name}=range(4).")
    yield from (dict(zip(over, values, strict=True)) for values in itertools.product(*over.values()))


def cells_at_once(rules: Mapping[Site, Rule], ids: Sequence[Sequence[int]], memory: int) -> int:
    """How many traces may share a forward; 1 if rows of a batch meet in the model.

    Counted are twice what the sites of its largest layer hold for one trace, and what the model returns.
    """
    if not ids or any(rule.together for rule in rules.values()):
        return 1
    layers: dict[int | None, int] = {}
    returned = 0
    for site, rule in rules.items():
        if site.port != "output":
            continue
        size = site_bytes(rule, len(ids), len(ids[0]))
        layers[layer_of(site.path)] = layers.get(layer_of(site.path), 0) + size
        returned += size if not site.path else 0
    return max(1, memory // max(2 * max(layers.values(), default=1) + returned, 1))


def site_bytes(rule: Rule, rows: int, seq: int) -> int:
    """Bytes of a site's whole for so many rows and tokens."""
    import torch

    lengths = {"batch": rows, "seq": seq, "batch·seq": rows * seq}
    size = int(getattr(torch, rule.dtype).itemsize)
    for dim in rule.dims:
        size *= lengths.get(dim.name, 1) if dim.size is None else dim.size
    return size


def same_values(one: Run, other: Run) -> bool:
    """Whether two runs saved the same, numbers up to :data:`SAME`, or what their dtype can tell."""
    if one.context.keys() != other.context.keys():
        return False
    return all(_same(value, other.context[name]) for name, value in one.context.items())


def _same(one: Any, other: Any) -> bool:
    import torch

    if not isinstance(one, torch.Tensor):
        return bool(type(one) is type(other) and one == other)
    if not isinstance(other, torch.Tensor) or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    a, b = one.double(), other.double()
    most = (
        max(SAME, 8 * float(torch.finfo(one.dtype).eps)) * float(a[a.isfinite()].abs().amax())
        if a.isfinite().any()
        else 0
    )
    return bool(torch.isclose(a, b, rtol=0, atol=most, equal_nan=True).all())


def ends_of(over: Over, most: int) -> list[int]:
    """Where forwards of no more than so many traces end, those of each with few values of the first names.

    Such traces mostly touch the model from the same layer on, before which nothing is computed twice.
    """
    sizes = [len(values) for values in over.values()]
    total, block = math.prod(sizes), 1
    while sizes and block * sizes[-1] <= min(most, ENOUGH):
        block *= sizes.pop()
    inner = sizes[-1] if block == 1 and sizes else block
    parts = -(-inner // max(most, 1))
    together = max(min(most // inner, -(-ENOUGH // inner)), 1)
    cuts = [inner * part // parts for part in range(1, parts)]
    starts = range(0, total, inner * together)
    found = {start + cut for start in range(0, total, inner) for cut in cuts}
    return sorted(found.union(starts, [total]))


@dataclass
class Batches:
    """Traces in as few forwards as are right. ``alone``: runs one; ``shared``: several in one forward.

    The latter is told whether layers that no trace touches may be passed by, and says how many were, beside
    the runs; ``None`` if it cannot be. ``together``: how many may share one at most; ``ends``: where
    one is to end at the latest. What is shared is checked against a trace alone when it is first used.
    """

    alone: Callable[[Cell], Run]
    shared: Callable[[list[Cell], bool], tuple[list[Run], int] | None]
    together: int
    ends: Sequence[int] = ()
    reuse: bool = True
    checked: bool = False

    def run(self, cells: Sequence[Cell], first: Run) -> list[Run]:
        """The runs of all; ``first``: that of the first alone."""
        made = [first]
        while len(made) < len(cells):
            at, runs = len(made), None
            if self.together > 1 and at + 1 < len(cells):
                runs = self._next(list(cells[at : self._end(at)]), (cells[0], first) if at == 1 else None)
            made += runs or [self.alone(cells[at])]
        return made

    def _end(self, at: int) -> int:
        """Where the traces of a forward end that begins with one of them."""
        return min([at + self.together, *self.ends[bisect.bisect_right(self.ends, at) :][:1]])

    def _next(self, cells: list[Cell], beside: tuple[Cell, Run] | None) -> list[Run] | None:
        """The runs of some, in one forward with one whose run is known, if any; ``None`` for other values."""
        found = self.shared([*([beside[0]] if beside else []), *cells], self.reuse)
        if found is None:
            self.together = 1
            return None
        runs, reused = found
        asked = bool(reused) and not self.checked
        alone = beside[1] if beside else self.alone(cells[-1]) if asked else None
        self.checked = self.checked or asked
        if alone is None or same_values(alone, runs[0 if beside else -1]):
            return runs[bool(beside) :]
        if asked:
            self.reuse = False
            return self._next(cells, beside)
        self.together = 1
        return None


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

        from flexmagic.client.run import Run

        Run.bring_contexts(self.runs)
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
