"""Naming the dims of a tensor by how its shape follows the input's.

The same model is looked at with two inputs of different prime (batch, seq) sizes; a length that
stays is a constant, one that follows batch, seq or their product gets that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PROBES: tuple[tuple[int, int], ...] = ((2, 5), (3, 7))
"""(batch, seq) of the two probe inputs: small, prime and pairwise different."""


@dataclass(frozen=True)
class Dim:
    """One dim: its name and, where the input does not change it, its constant length.

    ``per_row``: how often it counts every row, where the input has no other length to count by.
    """

    name: str
    size: int | None = None
    per_row: int = 0


def name_dims(
    first: tuple[int, ...], second: tuple[int, ...], names: Mapping[str, int]
) -> tuple[Dim, ...] | None:
    """Names for the dims of a tensor whose shape was seen with both probes.

    ``names`` gives the model's own constants, e.g. ``{"vocab": 1024}``; the first that fits names
    a constant dim. ``None`` if the shapes follow the input in no way known here.
    """
    if len(first) != len(second):
        return None
    out: list[Dim] = []
    for at, (a, b) in enumerate(zip(first, second, strict=True)):
        dim = _follow(a, b) or (Dim(_constant(a, at, first, names), a) if a == b else None)
        if dim is None:
            return None
        out.append(dim)
    return tuple(out)


def _follow(a: int, b: int) -> Dim | None:
    (b1, s1), (b2, s2) = PROBES
    for name, one, two in (
        ("batch", b1, b2),
        ("seq", s1, s2),
        ("batch·seq", b1 * s1, b2 * s2),
    ):
        if (a, b) == (one, two):
            return Dim(name)
    return None


def _constant(n: int, at: int, shape: tuple[int, ...], names: Mapping[str, int]) -> str:
    if n == 1:
        return "one"
    is_last = at == len(shape) - 1
    for name, size in names.items():
        # heads stand before the last dim of a 4-d tensor; every other constant is the last dim
        if size == n and is_last != (name in ("heads", "kv_heads")):
            return name
    return "feature" if is_last else f"dim{at}"


def follow_rows(
    first: tuple[int, ...], second: tuple[int, ...], rows: int, more: int
) -> tuple[Dim, ...] | None:
    """Names for the dims of a tensor seen with two numbers of rows: ``batch``, ``batch·…``, constants.

    ``None`` if the shapes follow the rows in no such way.
    """
    if len(first) != len(second):
        return None
    out = []
    for at, (a, b) in enumerate(zip(first, second, strict=True)):
        if a == b:
            out.append(Dim("feature" if at == len(first) - 1 else f"dim{at}", a))
        elif a % rows == 0 and a // rows * more == b:
            out.append(Dim("batch") if a == rows else Dim("batch·seq", per_row=a // rows))
        else:
            return None
    return tuple(out)
