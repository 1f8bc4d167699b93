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

SIGNIFICANT_BITS = {
    "bfloat16": 8,
    "float16": 11,
    "float32": 24,
    "float64": 53,
    "float8_e4m3fn": 4,
    "float8_e4m3fnuz": 4,
    "float8_e5m2": 3,
    "float8_e5m2fnuz": 3,
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
    x = float(value)
    if not math.isfinite(x):
        return "NaN" if math.isnan(x) else ("+Inf" if x > 0 else "-Inf")
    bits = SIGNIFICANT_BITS.get(dtype, 24)
    # A quarter of the gap between neighbours: safe also where the gap halves, at powers of two.
    gap = math.ldexp(1.0, math.frexp(x)[1] - bits)
    most = math.ceil(1 + bits * math.log10(2))
    texts = (f"{x:.{digits}g}" for digits in range(1, most))
    text = next((t for t in texts if abs(float(t) - x) < gap / 4), f"{x:.{most}g}")
    if "e" in text and _PLAIN_FROM <= abs(x) < _PLAIN_TO:
        return np.format_float_positional(float(text), trim="-")
    return text


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
