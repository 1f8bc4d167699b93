"""Hooks whose text shows that they do the same to every element, whatever the others are.

Such a body leaves of each piece of a tensor what it leaves of that part of the whole (powers up to their last
bit, which torch may round otherwise at a tensor's end): no rank needs what the others have.
"""

from __future__ import annotations

import ast
import functools

_BINARY = (
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow,
    ast.BitAnd, ast.BitOr, ast.BitXor, ast.LShift, ast.RShift,
)  # fmt: skip
_UNARY = (ast.USub, ast.UAdd, ast.Invert)
_ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)


@functools.lru_cache(maxsize=256)
def is_elementwise(text: str) -> bool:
    """Whether a hook's body is nothing but arithmetic of ``x`` and numbers, line by line.

    A comparison is, of two values; what asks a whole tensor whether it is true, calls or indexes is not.
    """
    try:
        lines = ast.parse(text).body
    except SyntaxError:  # some other form of code
        return False
    known = {"x"}
    return bool(lines) and all(_is_step(line, known) for line in lines)


def _is_step(line: ast.stmt, known: set[str]) -> bool:
    """Whether a statement computes a name from those that are ``known``; then it is known, too."""
    if isinstance(line, ast.Return):
        return line.value is not None and _is_arithmetic(line.value, known)
    if isinstance(line, ast.AugAssign):
        return (
            isinstance(line.target, ast.Name)
            and line.target.id in known
            and isinstance(line.op, _BINARY)
            and _is_arithmetic(line.value, known)
        )
    if not isinstance(line, ast.Assign) or not _is_arithmetic(line.value, known):
        return False
    names = [target.id for target in line.targets if isinstance(target, ast.Name)]
    known.update(names)
    return len(names) == len(line.targets)


def _is_arithmetic(value: ast.expr, known: set[str]) -> bool:
    if isinstance(value, ast.Constant):
        return isinstance(value.value, (bool, int, float))
    if isinstance(value, ast.Name):
        return value.id in known
    if isinstance(value, ast.UnaryOp):
        return isinstance(value.op, _UNARY) and _is_arithmetic(value.operand, known)
    if isinstance(value, ast.BinOp):
        sides = (value.left, value.right)
        return isinstance(value.op, _BINARY) and all(_is_arithmetic(side, known) for side in sides)
    if isinstance(value, ast.Compare) and len(value.ops) == 1:
        sides = (value.left, value.comparators[0])
        return isinstance(value.ops[0], _ORDER) and all(_is_arithmetic(side, known) for side in sides)
    return False
