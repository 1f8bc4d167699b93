"""A site's value while its hooks run, and what a hook may make of it."""

from __future__ import annotations

from typing import Any

import torch

from flexmagic.engine.exchange import Exchange, RunStopped
from flexmagic.engine.tensors import dtype_name
from flexmagic.errors import LayoutError
from flexmagic.layout.assemble import split
from flexmagic.layout.layout import Layout
from flexmagic.layout.rule import Rule


class SiteValue:
    """A site's value while its hooks run: the rank's piece, and the whole once a hook needs it."""

    def __init__(self, rule: Rule, exchange: Exchange, local: torch.Tensor) -> None:
        self._rule = rule
        self._exchange = exchange
        self._piece = local
        self._layout: Layout | None = None
        self._whole: torch.Tensor | None = None
        self._changed = False

    def whole(self, *, well: bool) -> torch.Tensor:
        """The whole tensor; raises :class:`RunStopped` as :meth:`Exchange.gather` does."""
        if self._whole is None:
            try:
                self._layout, self._whole = self._exchange.gather(self._rule, self._piece, well=well)
            except LayoutError as error:
                raise RunStopped(str(error)) from None
        return self._whole

    def put_whole(self, new: torch.Tensor) -> None:
        """Make a tensor the site's value."""
        self._whole, self._changed = new, True

    def piece(self) -> torch.Tensor:
        """The rank's piece; if the whole was changed, its own part of it."""
        if self._changed:
            assert self._layout is not None  # put_whole() follows whole()
            assert self._whole is not None
            own = split(self._layout, self._exchange.rank, self._whole)
            assert own is not None  # gather() refuses layouts in which a rank holds nothing
            self._piece, self._changed = own, False
        return self._piece

    def put_piece(self, new: torch.Tensor) -> None:
        """Make a tensor this rank's piece."""
        self._piece, self._whole, self._changed = new, None, False


def check_result(result: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Raise :class:`TypeError` or :class:`ValueError` for what cannot replace a tensor like this."""
    if not isinstance(result, torch.Tensor):
        msg = f"the hook left {type(result).__name__} in x, not a tensor"
        raise TypeError(msg)
    if result.shape != shape or result.dtype != dtype:
        msg = (
            f"the hook changed x from {_kind(shape, dtype)} to {_kind(result.shape, result.dtype)}; "
            "shape and dtype must stay"
        )
        raise ValueError(msg)
    if result.device != device:
        msg = f"the hook moved x from {device} to {result.device}"
        raise ValueError(msg)


def _kind(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)}{list(shape)}"
