"""Random numbers that user code draws alike on every rank, without disturbing the model's own."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import random
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def same_draws(what: str) -> Iterator[None]:
    """Random numbers that depend on ``what`` and on nothing else, so that every rank draws the same.

    The generators' states are put back at the end.
    """
    numpy_state, python_state = _NUMPY.state(), random.getstate()
    generators = _generators()
    states = [generator.get_state() for generator in generators]
    draw_from(what)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        _NUMPY.put_back(numpy_state)
        random.setstate(python_state)


_LEGACY: Any = np.random
"""Users draw from its own generator; not all of it has types."""


class _Numpy:
    """The state of numpy's own generator, from which users draw, read out of its memory.

    numpy copies it number by number, which takes longer than most hooks. It tells nowhere else whether it
    keeps a second normal number for the next draw; where it did not and nothing was drawn since, it still
    does not.
    """

    def __init__(self) -> None:
        self._of: Any = None
        self._address = 0
        self._known = b""

    def state(self) -> bytes | dict[str, Any]:
        """What :meth:`put_back` takes."""
        generator = _LEGACY.get_bit_generator()
        if generator is not self._of:
            self._of, self._known, self._address = generator, b"", 0
            if type(generator) is np.random.MT19937:
                self._address = int(generator.ctypes.state_address)
        raw = ctypes.string_at(self._address, _MT19937) if self._address else b""
        if raw and raw == self._known:
            return raw
        whole: dict[str, Any] = _LEGACY.get_state(legacy=False)
        self._known = b"" if whole.get("has_gauss", True) else raw
        return whole

    def put_back(self, state: bytes | dict[str, Any]) -> None:
        """Make it again what it was."""
        if isinstance(state, bytes) and _LEGACY.get_bit_generator() is self._of:
            np.random.seed(0)  # noqa: NPY002 - lets go of the second normal number
            ctypes.memmove(self._address, state, _MT19937)
        elif not isinstance(state, bytes):
            _LEGACY.set_state(state)


_MT19937 = 625 * 4
"""Bytes of the generator's state: 624 words, and which of them is next."""

_NUMPY = _Numpy()


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
