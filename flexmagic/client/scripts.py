"""A user's cells and functions as they are sent to the engines, checked before."""

from __future__ import annotations

import ast
import keyword
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flexmagic.engine.code import TRACE, check_cell, from_function, from_text
from flexmagic.errors import InputError

if TYPE_CHECKING:
    from flexmagic.engine.code import HookSource
    from flexmagic.engine.tracing import TraceSource


def trace_source(code: str | Callable[..., Any], given: Mapping[str, Any], first_line: int) -> TraceSource:
    """A trace; raises :class:`CellError` for code that does not compile, :class:`InputError` for none."""
    from flexmagic.engine.tracing import NAMES, TraceSource

    for name in given:
        if not name.isidentifier() or keyword.iskeyword(name) or name in NAMES:
            raise InputError(f"{name!r} cannot be given to a trace: it is no free name. Choose another.")
    if callable(code):
        return TraceSource(from_function(TRACE, 1, code), dict(given))
    source = from_text(TRACE, 1, code, first_line)
    check_cell(source)
    if not ast.parse(source.text).body:
        raise InputError("The trace is empty. Write the intervention below the line, e.g. x = model.output.")
    return TraceSource(source, dict(given))


def cell_source(text: str, first_line: int) -> HookSource:
    """A cell; raises :class:`CellError` for one that does not compile."""
    source = from_text("the cell", 1, text, first_line)
    check_cell(source)
    return source
