"""Reading a request's fields one by one, each by its type and within its bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.workshop.frames import MalformedError, take

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME, TEXT = 200, 20_000
"""Characters of the longest name, and of the longest text."""

_HALF = re.compile("[\\ud800-\\udfff]")
"""Halves of characters, which JSON can name, but nothing can print."""


class Plain:
    """Fields of one value each, or of a list of such."""

    def __init__(self, given: Mapping[str, Any], frames: Sequence[bytes]) -> None:
        self._given = dict(given)
        self._frames = frames

    @property
    def names(self) -> list[str]:
        """The fields that nobody has asked for yet, where it is the guest who names them."""
        return [_text("a name", name, NAME) for name in self._given]

    def _has(self, name: str) -> bool:
        """Whether a field is there and is not ``null``, which then counts as asked for."""
        if self._given.get(name) is None:
            self._given.pop(name, None)
            return False
        return True

    def _pop(self, name: str) -> Any:
        return self._given.pop(name, None)

    def text(self, name: str, most: int = NAME) -> str:
        """A text that is not empty."""
        return _text(name, self._pop(name), most)

    def optional(self, name: str, most: int = NAME) -> str | None:
        """A text, or ``None``."""
        return self.text(name, most) if self._has(name) else None

    def texts(self, name: str, most: int = 64, *, length: int = NAME) -> tuple[str, ...]:
        """A list of texts; empty if it is not there."""
        return tuple(_text(name, item, length) for item in self._list(name, most))

    def maybe_texts(self, name: str, most: int = 64) -> tuple[str, ...] | None:
        """A list of texts, or ``None``."""
        return self.texts(name, most) if self._has(name) else None

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number within bounds, both of which are meant."""
        value = self._pop(name)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise MalformedError(f"{name} must be a whole number from {low} to {high}.")
        return value

    def maybe_whole(self, name: str, low: int, high: int) -> int | None:
        """The same, or ``None``."""
        return self.whole(name, low, high) if self._has(name) else None

    def wholes(self, name: str, most: int, low: int, high: int) -> list[int]:
        """A list of whole numbers within bounds."""
        return [_whole(name, item, low, high) for item in self._list(name, most)]

    def numbers(self, name: str, most: int = 4) -> tuple[float, ...]:
        """A list of finite numbers."""
        return tuple(_number(name, item) for item in self._list(name, most))

    def maybe_number(self, name: str, low: float, high: float) -> float | None:
        """A number within bounds, or ``None``."""
        if not self._has(name):
            return None
        value = _number(name, self._pop(name))
        if not low <= value <= high:
            raise MalformedError(f"{name} must be a number from {low:g} to {high:g}.")
        return value

    def flag(self, name: str) -> bool:
        """Yes or no; no if it is not there."""
        value = self._pop(name)
        if value not in (None, True, False) or type(value) is int:
            raise MalformedError(f"{name} must be true or false.")
        return bool(value)

    def one_of(self, name: str, known: Sequence[str]) -> str:
        """One of some words."""
        value = self._pop(name)
        if not isinstance(value, str) or value not in known:
            raise MalformedError(f"{name} must be one of {', '.join(known)}.")
        return value

    def _list(self, name: str, most: int) -> list[Any]:
        value = self._pop(name)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most:
            raise MalformedError(f"{name} must be a list of at most {most}.")
        return value


class Fields(Plain):
    """What a guest sent: every field is asked for once, and :meth:`done` refuses what nobody asked for."""

    def array(self, name: str) -> NDArray[np.generic] | None:
        """An array, or ``None``."""
        value = self._pop(name)
        return None if value is None else take(value, self._frames)

    def index(self, name: str, most: int = 8) -> tuple[int | slice, ...]:
        """An index of ints and ``[start, stop]`` pairs, one per dim."""
        out: list[int | slice] = []
        for item in self._list(name, most):
            if isinstance(item, list) and len(item) == 2:
                out.append(slice(*(_whole(name, n, 0, 1 << 40) for n in item)))
            else:
                out.append(_whole(name, item, 0, 1 << 40))
        return tuple(out)

    def inputs(self, name: str) -> str | list[str] | list[list[int]]:
        """A text, texts, or rows of token ids."""
        value = self._pop(name)
        if isinstance(value, str):
            return _text(name, value, TEXT)
        rows = value if isinstance(value, list) and value and len(value) <= 256 else []
        if rows and all(isinstance(row, str) for row in rows):
            return [_text(name, row, TEXT) for row in rows]
        if rows and all(isinstance(row, list) and 0 < len(row) <= TEXT for row in rows):
            ids = [[_whole(name, i, 0, 1 << 31) for i in row] for row in rows]
            if len({len(row) for row in ids}) == 1:
                return ids
        raise MalformedError(f"{name} must be a text, texts, or rows of token ids of one length.")

    def within(self, name: str, most: int = 64) -> Fields:
        """The fields of an object, none if it is not there; they are to be read in turn."""
        value = self._pop(name)
        value = {} if value is None else value
        if not isinstance(value, dict) or len(value) > most:
            raise MalformedError(f"{name} must be an object of at most {most} fields.")
        return Fields(value, self._frames)

    def maybe(self, name: str) -> Fields | None:
        """The same, or ``None``."""
        return self.within(name) if self._has(name) else None

    def done(self) -> None:
        """Refuse what nobody asked for."""
        if self._given:
            raise MalformedError(f"This request has no field {next(iter(self._given))[:NAME]!r}.")


def _text(name: str, value: Any, most: int) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= most or "\0" in value or _HALF.search(value):
        raise MalformedError(f"{name} must be a text of 1 to {most:,} characters.")
    return value


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise MalformedError(f"{name} must hold whole numbers from {low} to {high}.")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
        raise MalformedError(f"{name} must hold finite numbers.")
    return float(value)
