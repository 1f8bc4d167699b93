"""Text that people read: escaped model text, numbers in their own precision, counts. Pure.

Whatever a model or a user named is hostile: everything that could hide, reorder or break text is
written out as an escape, and what is cut says how much is missing.
"""

from __future__ import annotations

import math
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

SPACE = "\N{OPEN BOX}"
"""Stands for a space at either end of a token, where it matters and cannot be seen."""

_NUMPY_FLOATS: dict[str, type[np.floating[Any]]] = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}
# What numpy does not have: bits of the significand, and the power of two of the smallest step.
_NARROW_FLOATS = {
    "bfloat16": (8, -133),
    "float8_e4m3fn": (4, -9),
    "float8_e4m3fnuz": (4, -10),
    "float8_e5m2": (3, -16),
    "float8_e5m2fnuz": (3, -17),
}
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", SPACE: "\\u2423"}
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MARKS_IN_A_ROW = 2
_PLAIN_FROM, _PLAIN_TO = 1e-4, 1e6


def visible(text: str, limit: int = 200) -> str:
    """Return ``text`` with everything invisible escaped, cut after ``limit`` characters.

    Control and bidirectional characters, line breaks, odd spaces, lone surrogates and piles of
    combining marks become escapes; a cut text ends with how many characters are missing.
    """
    out, marks = [], 0
    for char in text[:limit]:
        category = unicodedata.category(char)
        marks = marks + 1 if category in {"Mn", "Me"} else 0
        odd_space = category == "Zs" and char != " "
        if char in _SHORT:
            out.append(_SHORT[char])
        elif category in _UNSAFE or odd_space or marks > _MARKS_IN_A_ROW:
            out.append(_escape(char))
        else:
            out.append(char)
    rest = len(text) - limit
    return "".join(out) + (f"\N{HORIZONTAL ELLIPSIS}(+{rest:,} characters)" if rest > 0 else "")


def token(text: str, limit: int = 24) -> str:
    """Return a token as shown beside a row: escaped, its outer spaces marked, cut to ``limit``."""
    shown = visible(text[:limit], limit)
    lead = len(shown) - len(shown.lstrip(" "))
    rest = len(text) - limit
    uncut = lead < len(shown) and rest <= 0
    tail = len(shown) - len(shown.rstrip(" ")) if uncut else 0
    shown = SPACE * lead + shown[lead : len(shown) - tail] + SPACE * tail
    return shown + (f"\N{HORIZONTAL ELLIPSIS}+{rest:,}" if rest > 0 else "")


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def number(value: Any, dtype: str) -> str:
    """Return a value in the precision of ``dtype`` (torch's name for it).

    That is the shortest text which tells it from its neighbours. Integers and bools are exact,
    complex values have both parts.
    """
    if isinstance(value, (bool, np.bool_)):
        return str(bool(value))
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (complex, np.complexfloating)):
        part = "float64" if dtype == "complex128" else "float32"
        imag = number(float(value.imag), part)
        sign = "" if imag.startswith(("-", "+")) else "+"
        return f"{number(float(value.real), part)}{sign}{imag}j"
    return _real(float(value), dtype)


def _real(x: float, dtype: str) -> str:
    """Return the shortest text that tells ``x`` from its neighbours in ``dtype``."""
    if not math.isfinite(x):
        return "NaN" if math.isnan(x) else ("+Inf" if x > 0 else "-Inf")
    if dtype not in _NARROW_FLOATS:
        return _plain(_NUMPY_FLOATS.get(dtype, np.float32)(x))
    if x.is_integer() and abs(x) < _PLAIN_TO:
        return str(int(x)) if x else ("-0" if math.copysign(1, x) < 0 else "0")
    bits, least = _NARROW_FLOATS[dtype]
    fraction, exponent = math.frexp(abs(x))
    step = math.ldexp(1.0, max(exponent - bits, least))
    # Below a power of two the neighbours stand twice as close.
    below = step / 4 if fraction == 0.5 else step / 2
    for digits in range(1, math.ceil(1 + bits * math.log10(2))):
        text = f"{x:.{digits}g}"
        away = abs(float(text)) - abs(x)
        if -below < away < step / 2:
            return _plain(np.float64(text))
    return _plain(np.float64(f"{x:.{math.ceil(1 + bits * math.log10(2))}g}"))


def _plain(x: np.floating[Any]) -> str:
    """Return the shortest text of a numpy float, without an exponent where it is of usual size."""
    if x == 0 or _PLAIN_FROM <= abs(float(x)) < _PLAIN_TO:
        return np.format_float_positional(x, trim="-")
    return np.format_float_scientific(x, trim="-")


def short(value: float) -> str:
    """Return a statistic or a limit in four significant digits."""
    return "none" if math.isnan(value) else f"{value:.4g}"


def plural(count: int, noun: str) -> str:
    """Return ``1 cell``, ``2,000 cells``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size(count: int) -> str:
    """Return a number of bytes with its unit."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def span(start: int, stop: int) -> str:
    """Return a half-open span the way Python writes it: one position, or ``start:stop``."""
    return str(start) if stop == start + 1 else f"{start}:{stop}"


def ranks(numbers: Sequence[int]) -> str:
    """Return ``rank 3`` or ``ranks 0, 1, 2``, with runs shortened (``ranks 0-7``)."""
    ordered = sorted(set(numbers))
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}\N{EN DASH}{b}" for a, b in runs]
    return ("rank " if len(ordered) == 1 else "ranks ") + ", ".join(texts)
