"""Random numbers that user code draws alike on every rank, without disturbing the model's own."""

from __future__ import annotations

import ast
import contextlib
import functools
import random
import zlib
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def same_draws(what: str) -> Iterator[None]:
    """Random numbers that depend on ``what`` and on nothing else, so that every rank draws the same.

    The generators' states are put back at the end.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - users draw from it
    generators = _generators()
    states = [generator.get_state() for generator in generators]
    draw_from(what)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def draw_from(what: str) -> None:
    """Begin drawing as :func:`same_draws` does, within it."""
    seed = zlib.crc32(what.encode())
    for generator in _generators():
        generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


_CANNOT_DRAW = (
    ast.Module, ast.Expr, ast.Assign, ast.AugAssign, ast.Return, ast.If, ast.Pass,
    ast.Name, ast.Constant, ast.Subscript, ast.Slice, ast.Tuple,
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp,
    ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


@functools.lru_cache(maxsize=256)
def cannot_draw(text: str) -> bool:
    """Whether a hook's body has nothing but ``x``, numbers and operators: to keep states takes 0.2 ms."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:  # some other form of code
        return False
    known = {"x", *(n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))}
    return all(
        isinstance(node, _CANNOT_DRAW) and (not isinstance(node, ast.Name) or node.id in known)
        for node in nodes
    )


def seed_model(seed: int) -> None:
    """Fix what the model itself draws, as ``torch.manual_seed`` does, on the devices that are there.

    That notes the whole stack, as text, for each kind of device that is not there, which takes 2 ms.
    """
    torch.default_generator.manual_seed(seed)
    if torch.accelerator.is_available():
        torch.get_device_module().manual_seed_all(seed)


def _generators() -> list[torch.Generator]:
    found = [torch.default_generator]
    if torch.cuda.is_available():
        found.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return found
