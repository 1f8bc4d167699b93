"""Where and when a hook acts: steps of a generation, rows, tokens, every k-th run, a condition.

What is picked is the same on every rank: it follows from the run and from the whole tensor, never
from a rank's piece.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from flexmagic.errors import InputError
from flexmagic.layout.dims import Dim
from flexmagic.layout.heads import Heads
from flexmagic.layout.part import Places, spans_of

_PART = re.compile(r"(-?\d+)|(-?\d*):(-?\d*)(?::(\d*))?")

CONDITION_NAMES = ("run", "step", "ctx", "site", "index", "seed")
"""What a condition may use: numbers and names of the run, and what hooks saved in it."""

Picked = int | str | slice | Sequence[int]
"""Positions as a user gives them: ``3``, ``-1``, ``"1:3"``, ``slice(1, 3)``, ``"0,2"`` or ``[0, 2]``."""


@dataclass(frozen=True)
class Picks:
    """Positions along something, as text: ``3``, ``-1``, ``1:``, ``1:3``, or several with commas."""

    text: str

    @classmethod
    def read(cls, value: Picked, what: str) -> Picks:
        """Positions as the user gave them; raises :class:`InputError` for anything else."""
        if isinstance(value, slice):
            ends = ["" if n is None else str(n) for n in (value.start, value.stop)]
            text = ":".join([*ends, str(value.step)] if value.step is not None else ends)
        elif isinstance(value, (str, int)):
            text = str(value)
        else:
            text = ",".join(map(str, value))
        text = text.replace(" ", "")
        found = [_PART.fullmatch(part) for part in text.split(",")]
        if isinstance(value, bool) or not all(found) or any(m is not None and m[4] == "0" for m in found):
            raise InputError(f"{what} {value!r} names no positions: write 3, -1, 1: or 1:3.")
        return cls(text)

    def _parts(self) -> Iterator[int | slice]:
        for part in self.text.split(","):
            if ":" in part:
                yield slice(*(int(n) if n else None for n in part.split(":")))
            else:
                yield int(part)

    @property
    def from_the_end(self) -> bool:
        """Whether any position counts from the end."""
        return "-" in self.text

    def among(self, n: int, what: str = "", *, strict: bool = False) -> list[int]:
        """The positions among ``n``, ascending; ``strict``: raise :class:`IndexError` for one beyond."""
        out: set[int] = set()
        for part in self._parts():
            if isinstance(part, slice):
                out.update(range(n)[part])
            elif -n <= part < n:
                out.add(part % n)
            elif strict:
                raise IndexError(f"there is no {what} {part}: this tensor has {n}")
        return sorted(out)

    def covers(self, number: int) -> bool:
        """Whether a number counted from 0 is meant, of which there is no last one."""
        return number in self.among(number + 1)

    def __str__(self) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True)
class Limits:
    """What restricts a hook; the default is none.

    ``step``: the steps of a generation, its prefill being step 0. ``row`` and ``token``: the part
    of the whole tensor that the body sees as ``x``. ``every``: act in the runs whose number it
    divides. ``when``: a condition over :data:`CONDITION_NAMES`.
    """

    step: Picks | None = None
    row: Picks | None = None
    token: Picks | None = None
    every: int = 1
    when: str = ""

    @classmethod
    def read(
        cls,
        step: Picked | None = None,
        row: Picked | None = None,
        token: Picked | None = None,
        every: int = 1,
        when: str = "",
    ) -> Limits:
        """Limits as the user gave them; raises :class:`InputError` for what can pick nothing."""
        picks = {
            name: None if value is None else Picks.read(value, name)
            for name, value in (("step", step), ("row", row), ("token", token))
        }
        if picks["step"] is not None and picks["step"].from_the_end:
            raise InputError("Steps count from 0, the prefill; how many there will be is not known before.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every {every!r}: give a number of runs, 1 or more.")
        _check_condition(when)
        return cls(**picks, every=every, when=when.strip())

    @property
    def options(self) -> dict[str, str]:
        """The limits there are, by name, as text."""
        defaults = Limits()
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) for name, value in named.items() if value != getattr(defaults, name)}

    @property
    def whole(self) -> bool:
        """Whether the body sees all rows and tokens."""
        return self.row is None and self.token is None

    @property
    def asks_hooks(self) -> bool:
        """Whether the condition depends on what hooks saved, which may differ between ranks."""
        return bool(self.when) and "ctx" in _names(ast.parse(self.when, mode="eval"))

    def meets(self, number: int) -> bool:
        """Whether the hook acts in the run of a number at all."""
        return number % self.every == 0

    def holds(self, names: Mapping[str, Any]) -> bool:
        """Whether the condition holds; ``names`` has :data:`CONDITION_NAMES`."""
        if not self.when:
            return True
        code = compile(self.when, "<when>", "eval")
        return bool(eval(code, {name: names[name] for name in CONDITION_NAMES}))  # noqa: S307 - the user's own

    def window(self, dims: Sequence[Dim], shape: Sequence[int], past: int, *, strict: bool) -> Window:
        """The part of a whole tensor that the body sees.

        Tokens count from the start of their row, of which ``past`` came before this tensor.
        ``strict``: raise :class:`IndexError` for a token that is not in it.
        """
        parts: list[tuple[int, slice | torch.Tensor]] = []
        if self.row is not None:
            at = the_dim(dims, "batch")
            parts.append((at, _index(self.row.among(shape[at], "row", strict=True))))
        if self.token is not None:
            at = the_dim(dims, "seq")
            found = self.token.among(past + shape[at], "token", strict=strict)
            parts.append((at, _index([position - past for position in found if position >= past])))
        return Window(tuple(parts))

    def places(
        self, dims: Sequence[Dim], shape: Sequence[int], past: int, heads: Heads | None
    ) -> Places | None:
        """The part of a whole tensor that the body sees, where it is less and there is one."""
        try:
            return Window(self.window(dims, shape, past, strict=True).parts, heads).places(shape)
        except (InputError, IndexError):  # said when the body is to run
            return None

    def __str__(self) -> str:
        """``step 1:, token -1``; empty without limits."""
        return ", ".join(f"{name} {value}" for name, value in self.options.items())


@dataclass(frozen=True)
class Window:
    """A part of a tensor: along some dims, a slice or a list of positions, then ``heads`` of its features."""

    parts: tuple[tuple[int, slice | torch.Tensor], ...]
    heads: Heads | None = None

    @property
    def everything(self) -> bool:
        """Whether it is the whole tensor as it stands."""
        return not self.parts and self.heads is None

    @property
    def empty(self) -> bool:
        """Whether nothing is in it."""
        return any(isinstance(part, slice) and part.start == part.stop for _, part in self.parts)

    @property
    def is_view(self) -> bool:
        """Whether what is written into the part is written into the whole."""
        as_view = self.heads is None or self.heads.step is not None
        return as_view and all(isinstance(part, slice) for _, part in self.parts)

    def places(self, shape: Sequence[int]) -> Places | None:
        """The part as spans of dims of a whole tensor; ``None`` if it is empty, or all of it."""
        spans = {
            dim: spans_of(range(shape[dim])[part] if isinstance(part, slice) else part.tolist())
            for dim, part in self.parts
        }
        if self.heads is not None and (features := self.heads.spans()) != ((0, shape[-1]),):
            spans[len(shape) - 1] = features
        return None if self.empty or not spans else spans

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The part, all dims kept: a view where positions are evenly spaced, else a copy.

        Heads come in two dims ``[..., heads, head_dim]`` in place of the features.
        """
        for dim, part in self.parts:
            whole = whole[(slice(None),) * dim + (part,)]
        return whole if self.heads is None else self.heads.cut(whole)

    def paste(self, whole: torch.Tensor, new: torch.Tensor) -> None:
        """Write the part into the whole tensor in place."""
        if not self.parts:
            if self.heads is None:
                whole[...] = new
            else:
                self.heads.paste(whole, new)
            return
        (dim, part), rest = self.parts[0], Window(self.parts[1:], self.heads)
        index = (slice(None),) * dim + (part,)
        inner = whole[index]
        rest.paste(inner, new)
        if not isinstance(part, slice):
            whole[index] = inner


def the_dim(dims: Sequence[Dim], name: str) -> int:
    """The one dim of a name; raises :class:`InputError` if there is none, or several."""
    found = [at for at, dim in enumerate(dims) if dim.name == name and dim.size is None]
    if len(found) != 1:
        listed = ", ".join(d.name if d.size is None else f"{d.name} {d.size}" for d in dims)
        many = "no" if not found else f"{len(found)}"
        raise InputError(f"it has {many} {name} dim{'' if len(found) == 1 else 's'}: [{listed}]")
    return found[0]


def _index(positions: list[int]) -> slice | torch.Tensor:
    if not positions:
        return slice(0, 0)
    stride = positions[1] - positions[0] if len(positions) > 1 else 1
    if positions == list(range(positions[0], positions[-1] + 1, stride)):
        return slice(positions[0], positions[-1] + 1, stride)
    return torch.tensor(positions)


def _check_condition(when: str) -> None:
    if not when.strip():
        return
    try:
        parsed = ast.parse(when.strip(), mode="eval")
    except SyntaxError as error:
        raise InputError(f"The condition {when!r} is no expression: {error.msg}.") from None
    unknown = sorted(_names(parsed) - set(CONDITION_NAMES) - set(vars(builtins)))
    if unknown:
        raise InputError(
            f"The condition {when!r} uses {', '.join(unknown)}; it must be the same on every rank "
            f"and may use {', '.join(CONDITION_NAMES)}."
        )


def _names(parsed: ast.AST) -> set[str]:
    """The names an expression reads and does not make itself."""
    names = [node for node in ast.walk(parsed) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    made |= {node.arg for node in ast.walk(parsed) if isinstance(node, ast.arg)}
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - made
