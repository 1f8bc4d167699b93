"""Hooks without code: what is done to a site is named, and only data is given with it.

Each is a plain function of this module under the numbers and values of a :class:`Declared`, so that
nothing of whoever asks for it is ever compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from flexmagic.engine.code import HookSource
from flexmagic.errors import InputError

Act = Callable[[torch.Tensor, tuple[float, ...], torch.Tensor | None], torch.Tensor]


def _zero(x: torch.Tensor, _numbers: tuple[float, ...], _values: torch.Tensor | None) -> torch.Tensor:
    return torch.zeros_like(x)


def _scale(x: torch.Tensor, numbers: tuple[float, ...], _values: torch.Tensor | None) -> torch.Tensor:
    return x * numbers[0]


def _add(x: torch.Tensor, numbers: tuple[float, ...], values: torch.Tensor | None) -> torch.Tensor:
    return x + _fitting(values, x) * (numbers[0] if numbers else 1.0)


def _mean(x: torch.Tensor, _numbers: tuple[float, ...], values: torch.Tensor | None) -> torch.Tensor:
    if values is not None:
        return _fitting(values, x).clone()
    return x.mean(tuple(range(x.ndim - 1)), keepdim=True).expand_as(x).clone()


def _resample(x: torch.Tensor, _numbers: tuple[float, ...], _values: torch.Tensor | None) -> torch.Tensor:
    if len(x) < 2:
        raise ValueError("resample takes each row from another one: give the run two rows or more")
    return x.roll(int(torch.randint(1, len(x), ())), 0)


def _patch(x: torch.Tensor, _numbers: tuple[float, ...], values: torch.Tensor | None) -> torch.Tensor:
    return _fitting(values, x).clone()


def _project(x: torch.Tensor, _numbers: tuple[float, ...], values: torch.Tensor | None) -> torch.Tensor:
    assert values is not None  # checked when it was made
    direction = values.to(device=x.device, dtype=x.dtype)
    if direction.shape != x.shape[-1:]:
        raise ValueError(f"the direction has {len(direction)} values; this site has {x.shape[-1]} features")
    direction = direction / direction.norm()
    return x - (x @ direction)[..., None] * direction


def _clamp(x: torch.Tensor, numbers: tuple[float, ...], _values: torch.Tensor | None) -> torch.Tensor:
    return x.clamp(*numbers)


@dataclass(frozen=True)
class Kind:
    """What one of them does, how many numbers it takes, and whether values; ``None``: either."""

    act: Act
    says: str
    numbers: tuple[int, int] = (0, 0)
    values: bool | None = False


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "zero": Kind(_zero, "zeros"),
        "scale": Kind(_scale, "times a number", (1, 1)),
        "add": Kind(_add, "plus a vector, times a number if one is given", (0, 1), values=True),
        "mean": Kind(_mean, "the mean over all positions of the input, or one that is given", values=None),
        "resample": Kind(_resample, "for each row the value of another row, drawn by the run's seed"),
        "patch": Kind(_patch, "a value that is given", values=True),
        "project": Kind(_project, "without its part along a direction", values=True),
        "clamp": Kind(_clamp, "held between two numbers", (2, 2)),
    }
)
"""All there are, by name."""


@dataclass(frozen=True, eq=False)
class Declared:
    """One hook without code: a name of :data:`KINDS`, its numbers, and its values, a CPU tensor.

    Values fit a site if they can be expanded to the part of it that the hook sees: ``[hidden]`` or
    ``[batch, seq, hidden]``, say. Raises :class:`InputError` for what makes no hook.
    """

    kind: str
    numbers: tuple[float, ...] = ()
    values: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no hook, before anything is sent."""
        if self.kind not in KINDS:
            raise InputError(f"There is no {self.kind!r} to do at a site. There are: {', '.join(KINDS)}.")
        known = KINDS[self.kind]
        least, most = known.numbers
        if not least <= len(self.numbers) <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise InputError(f"{self.kind} takes {wanted} numbers, not {len(self.numbers)}.")
        if not all(math.isfinite(n) for n in self.numbers):
            raise InputError(f"{self.kind} takes finite numbers.")
        if self.kind == "clamp" and self.numbers[0] > self.numbers[1]:
            raise InputError("clamp takes the smaller number first.")
        if known.values is not None and known.values != (self.values is not None):
            raise InputError(f"{self.kind} takes {'values' if known.values else 'no values'}.")
        if self.values is not None and not (self.values.is_floating_point() and self.values.numel()):
            raise InputError(f"{self.kind} takes values of a floating-point dtype, at least one.")
        if self.kind == "project":
            assert self.values is not None  # as this kind takes some
            if self.values.ndim != 1 or not bool(self.values.norm().isfinite() and self.values.norm() > 0):
                raise InputError("project takes one direction, [features], that is finite and not zero.")

    def function(self) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """The hook as a function ``(x, h)`` of the whole tensor."""
        act, numbers, values = KINDS[self.kind].act, self.numbers, self.values

        def declared(x: torch.Tensor, _h: Any) -> torch.Tensor:
            return act(x, numbers, values).to(x.dtype)

        return declared

    def __str__(self) -> str:
        """As it is written: ``scale 0.5``, ``add [256]``."""
        values = [] if self.values is None else [str(list(self.values.shape))]
        return " ".join([self.kind, *(f"{n:g}" for n in self.numbers), *values])


def declares(source: HookSource) -> bool:
    """Whether a hook is the function of a :class:`Declared`."""
    known = source.function
    return known is not None and known.__qualname__ == f"{Declared.function.__qualname__}.<locals>.declared"


def _fitting(values: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Values in the form of a tensor; raises :class:`ValueError` where they cannot have it."""
    assert values is not None  # checked when it was made
    try:
        return values.to(device=x.device, dtype=x.dtype).expand_as(x)
    except RuntimeError:
        raise ValueError(f"values {list(values.shape)} do not fit what is here, {list(x.shape)}") from None
