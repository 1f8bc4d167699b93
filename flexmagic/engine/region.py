"""Where a run's graph enters and leaves the region in which every rank computes the same on the whole.

Inside, every rank holds the whole tensor and the whole gradient of it, as one process does: what a
hook computes there, in modules of its own or for the loss, has its full derivative on every rank.
Going in, a gradient is taken apart as gradients lie at the site; coming out, it is put together.
"""

from __future__ import annotations

from typing import Any

import torch

from flexmagic.engine.exchange import Exchange
from flexmagic.layout.assemble import split
from flexmagic.layout.layout import Layout
from flexmagic.layout.rule import Rule


def enter(
    piece: torch.Tensor, whole: torch.Tensor, layout: Layout, gradient: Rule, exchange: Exchange
) -> torch.Tensor:
    """The whole tensor, part of the graph by this rank's piece, of whose gradient it gets its part."""
    shapes = [layout.local_shape(rank) for rank in range(layout.mesh.size)]
    box = [whole]  # not an argument of its own: the result must be no view of one
    return _Entered.apply(piece, box, gradient.local_layout(shapes, exchange.extent), exchange.rank)


def leave(whole: torch.Tensor, layout: Layout, gradient: Rule, exchange: Exchange) -> torch.Tensor:
    """A rank's piece of a whole tensor, whose gradient is made whole again on the way back."""
    return _Left.apply(whole, layout, gradient, exchange)


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _piece: torch.Tensor, box: list[torch.Tensor], layout: Layout, rank: int
    ) -> torch.Tensor:
        ctx.layout, ctx.rank = layout, rank
        return box.pop()

    @staticmethod
    def backward(ctx: Any, whole: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        own = split(ctx.layout, ctx.rank, whole)
        assert own is not None  # this rank holds a piece of the forward's value
        return own, None, None, None


class _Left(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, whole: torch.Tensor, layout: Layout, gradient: Rule, exchange: Exchange
    ) -> torch.Tensor:
        ctx.gradient, ctx.exchange = gradient, exchange
        own = split(layout, exchange.rank, whole)
        assert own is not None  # gather() refuses layouts in which a rank holds nothing
        return own

    @staticmethod
    def backward(ctx: Any, piece: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        _, whole = ctx.exchange.gather(ctx.gradient, piece.contiguous(), well=True)
        return whole, None, None, None
