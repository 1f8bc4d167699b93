"""User code for hooks: from a cell's body to a function, and from an exception to the user's line.

A body becomes the body of a function whose parameters are the names a hook may use. What ``x`` is
when the body ends is the site's new value; ``return value`` does the same earlier.
"""

from __future__ import annotations

import ast
import functools
import inspect
import pickle
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flexmagic.engine.limits import Limits
from flexmagic.engine.tensors import check_result
from flexmagic.errors import CellError, HookError, RankFailure

NAMES = ("x", "site", "index", "step", "ctx", "module", "rank", "modules", "persistent")
"""What a hook body sees besides the engine's own namespace; the function form gets ``(x, h)``."""

LEFT = "__left__"
"""What a body calls with the value that it leaves."""

TRACE = "trace"
"""The name of the code of a run's trace, where hooks have theirs."""


TRACEBACK = 8_000
"""The most characters of a traceback that travel: its end."""


@dataclass(frozen=True)
class HookSource:
    """A hook as it travels: a cell's body as ``text``, or a ``function`` (then ``text`` is its source).

    ``first_line`` is the line of the user's cell on which ``text`` starts. ``local``: the hook
    gets each rank's own piece instead of the whole. ``owner``: the session it belongs to.
    ``limits``: where and when it acts. ``boxed``: whether its code runs walled in, see
    :mod:`flexmagic.engine.box`.
    """

    name: str
    version: int
    text: str = ""
    function: Callable[..., Any] | None = None
    first_line: int = 1
    local: bool = False
    owner: str = ""
    limits: Limits = field(default_factory=Limits)
    boxed: bool = False

    @property
    def filename(self) -> str:
        """What stands for a file name in tracebacks of this hook."""
        if self.function is not None:
            return self.function.__code__.co_filename
        return f"<flexhook {self.name} v{self.version}>"

    @functools.cached_property
    def captures_only(self) -> bool:
        """Whether there is nothing to run: no statement in the body."""
        return self.function is None and not ast.parse(self.text).body

    def line(self, number: int | None) -> str:
        """The text of a line of the user's cell, ``""`` if it is not known here."""
        lines = self.text.splitlines()
        at = -1 if number is None else number - self.first_line
        return lines[at] if 0 <= at < len(lines) else ""


class ToldError(Exception):
    """What user code raised in another process, as that said it: plain values.

    ``kind``: the exception's class; ``where``: line of the user's cell, first and last column.
    """

    def __init__(
        self, kind: str, message: str, where: tuple[int | None, ...] = (None, None, None), trace: str = ""
    ) -> None:
        super().__init__(message)
        self.kind, self.where, self.trace = kind, where, trace


def from_text(
    name: str, version: int, text: str, first_line: int = 1, *, local: bool = False, owner: str = ""
) -> HookSource:
    """A hook or cell from its text."""
    return HookSource(name, version, textwrap.dedent(text), None, first_line, local, owner)


def from_function(
    name: str, version: int, function: Callable[..., Any], *, local: bool = False, owner: str = ""
) -> HookSource:
    """A hook or builder from a function; its source, where there is one, is kept for error messages."""
    try:
        lines, first_line = inspect.getsourcelines(function)
    except (OSError, TypeError):
        lines, first_line = [], 1
    return HookSource(name, version, "".join(lines), function, first_line, local, owner)


def shifted(source: HookSource) -> str:
    """The text with blank lines in front, so that line numbers count as the user's cell does."""
    return "\n" * (source.first_line - 1) + source.text


def check(source: HookSource) -> None:
    """Compile a hook without running it; raise :class:`HookError` with the user's line and a caret."""
    try:
        if source.function is None:
            _compile(source)
    except SyntaxError as error:
        raise HookError(_syntax_message(f"hook {source.name!r}", source, error)) from None


def check_cell(source: HookSource) -> None:
    """The same for a cell that runs as it stands; raises :class:`CellError`."""
    try:
        compile(shifted(source), source.filename, "exec")
    except SyntaxError as error:
        raise CellError(_syntax_message("the cell", source, error)) from None


def _syntax_message(what: str, source: HookSource, error: SyntaxError) -> str:
    line = error.lineno or 1
    text = (error.text or "").rstrip("\n") or source.line(line)
    column = max((error.offset or 1) - 1, 0)
    return (
        f"{what} has a syntax error on line {line}; nothing was sent to the engines.\n"
        f"    {text}\n    {' ' * column}^\n{type(error).__name__}: {error.msg}"
    )


def build(source: HookSource, namespace: dict[str, Any]) -> Callable[[dict[str, Any]], Any]:
    """The hook as a function of its names (see :data:`NAMES`), its globals the given namespace."""
    if source.function is not None:
        return _from_function(source.function, namespace)
    body = _defined(_compile(source), namespace)
    return lambda names: body(**names, **{LEFT: _like(names["x"])})


def build_script(
    source: HookSource, names: Sequence[str], namespace: dict[str, Any]
) -> Callable[[dict[str, Any]], Any]:
    """A whole cell as a function of ``names``, or a function that gets those of them that it takes.

    What a cell's last expression gives is what it returns.
    """
    function = source.function
    if function is None:
        statements = ast.parse(shifted(source), source.filename).body
        if statements and isinstance(last := statements[-1], ast.Expr):
            statements[-1] = ast.copy_location(ast.Return(last.value), last)
        body = _defined(_compiled(source, names, statements), namespace)
        return lambda given: body(**given)
    takes = inspect.signature(function).parameters

    def call(given: dict[str, Any]) -> Any:
        _bring(function, namespace)
        return function(**{name: value for name, value in given.items() if name in takes})

    return call


def _like(x: torch.Tensor) -> Callable[[Any], Any]:
    """What hands on a value that can replace a tensor, and raises on the line where another one is left."""
    shape, dtype, device = x.shape, x.dtype, x.device

    def left(value: Any) -> Any:
        check_result(value, shape, dtype, device)
        return value

    return left


def _defined(code: Any, namespace: dict[str, Any]) -> Callable[..., Any]:
    found: dict[str, Any] = {}
    # two mappings would make the body's free names invisible: define it in the namespace itself
    exec(code, namespace, found)  # noqa: S102 - running the user's code is the product
    body: Callable[..., Any] = found["__flexhook__"]
    return body


def _from_function(
    function: Callable[..., Any], namespace: dict[str, Any]
) -> Callable[[dict[str, Any]], Any]:
    """A function from the notebook; names it did not bring along are the engine's namespace's."""

    def call(names: dict[str, Any]) -> Any:
        _bring(function, namespace)
        given = dict(names)
        x = given.pop("x")
        result = function(x, HookView(**given))
        return x if result is None else result

    return call


def _bring(function: Callable[..., Any], namespace: dict[str, Any]) -> None:
    """Let a function see the names of the engine that it did not bring along."""
    for name in function.__code__.co_names:
        if name in namespace:
            function.__globals__.setdefault(name, namespace[name])


@dataclass
class HookView:
    """What a function hook gets as ``h`` beside the tensor ``x``."""

    site: str
    index: int | None
    step: int
    ctx: dict[str, Any]
    module: Any
    rank: int
    modules: Any
    persistent: dict[str, Any]


class _Returns(ast.NodeTransformer):
    """Make each ``return`` hand back a checked value, a bare one ``x``; functions inside keep their own."""

    def visit_Return(self, node: ast.Return) -> ast.Return:
        value = node.value or ast.copy_location(ast.Name("x", ast.Load()), node)
        checked = ast.Call(ast.copy_location(ast.Name(LEFT, ast.Load()), node), [value], [])
        node.value = ast.copy_location(checked, node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        return node


def _compile(source: HookSource) -> Any:
    parsed = ast.parse(shifted(source), source.filename)
    end, line = ast.parse(f"return {LEFT}(x)").body, _last_set(parsed)
    for node in ast.walk(end[0]):
        if isinstance(node, (ast.stmt, ast.expr)):
            node.lineno = node.end_lineno = line
            node.col_offset = node.end_col_offset = -1  # all of the line
    body: list[ast.stmt] = [_Returns().visit(statement) for statement in parsed.body]
    return _compiled(source, (*NAMES, LEFT), [*body, *end])


def _last_set(parsed: ast.Module) -> int:
    """The last line that gives ``x`` a value, or the last of all."""
    names = [node for node in ast.walk(parsed) if isinstance(node, ast.Name) and node.id == "x"]
    lines = [node.lineno for node in names if isinstance(node.ctx, ast.Store)]
    return max(lines, default=parsed.body[-1].lineno if parsed.body else 1)


def _compiled(source: HookSource, names: Sequence[str], body: list[ast.stmt]) -> Any:
    """The code that defines ``__flexhook__``, a function of ``names`` with a body."""
    template = ast.parse(f"def __flexhook__({', '.join(names)}):\n    pass")
    function = template.body[0]
    assert isinstance(function, ast.FunctionDef)  # the template above is one
    function.body = [*body, *function.body]
    return compile(template, source.filename, "exec")


def failure(
    rank: int,
    error: BaseException,
    filename: str,
    *,
    site: str = "",
    source: HookSource | None = None,
    step: int | None = None,
) -> RankFailure:
    """An exception from user code as data: its kind, message and the user's own line."""
    if isinstance(error, ToldError):
        return _told(rank, error, site, source, step)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == filename]
    line = own[-1].lineno if own else None
    if line is None and source is not None and source.function is not None and source.text:
        line = source.first_line  # what it returned was wrong
    text = source.line(line) if source else ""
    return RankFailure(
        rank=rank,
        kind=type(error).__name__,
        message=str(error),
        site=site,
        hook=source.name if source else "",
        line=line,
        text=text,
        cause=_portable(error),
        columns=_columns(own[-1], text) if own and text else None,
        step=step,
        trace="".join(traceback.format_exception(error))[-TRACEBACK:],
    )


def _told(rank: int, error: ToldError, site: str, source: HookSource | None, step: int | None) -> RankFailure:
    """What another process said of an exception, as data."""
    line, start, end = error.where
    text = source.line(line) if source else ""
    inside = start is not None and end is not None and 0 <= start < end <= len(text)
    return RankFailure(
        rank=rank, kind=error.kind, message=str(error), site=site, hook=source.name if source else "",
        line=line, text=text, columns=(start or 0, end or 0) if inside else None, step=step,
        trace=error.trace,
    )  # fmt: skip


def _columns(frame: traceback.FrameSummary, text: str) -> tuple[int, int] | None:
    """Which characters of the line failed; ``None`` if it is all of it, or not known."""
    if frame.colno is None or frame.end_colno is None:
        return None
    raw = text.encode()  # Python counts bytes
    start, end = (
        len(raw[: frame.colno].decode(errors="replace")),
        len(raw[: frame.end_colno].decode(errors="replace")),
    )
    if frame.end_lineno != frame.lineno:
        end = len(text.rstrip())
    return None if text[start:end].strip() == text.strip() or end <= start else (start, end)


def _portable(error: BaseException) -> BaseException | None:
    """The exception without its frames if it survives pickling, else ``None``."""
    try:
        copied = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - any class may define any __reduce__
        return None
    return copied if isinstance(copied, BaseException) else None
