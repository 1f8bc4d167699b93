"""A site's value while its hooks run, and what a hook may make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from flexmagic.engine.exchange import Exchange, Pick, RunStopped
from flexmagic.engine.region import enter, leave
from flexmagic.errors import LayoutError
from flexmagic.layout.assemble import split
from flexmagic.layout.layout import Layout
from flexmagic.layout.part import Part
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site


class SiteValue:
    """A site's value while its hooks run: the rank's piece, and the whole once a hook needs it.

    ``gradient``: how gradients lie at the site, where that is known. What is computed on the whole is
    then differentiated as in one process on every rank.
    """

    def __init__(
        self, rule: Rule, exchange: Exchange, local: torch.Tensor, gradient: Rule | None = None
    ) -> None:
        self._rule = rule
        self._exchange = exchange
        self._piece = local
        self._gradient = gradient
        self._layout: Layout | None = None
        self._whole: torch.Tensor | None = None
        self._part: Part | None = None
        self._changed = False

    def whole(self, *, well: bool, copied: bool = True) -> torch.Tensor:
        """The whole tensor; raises :class:`RunStopped` as :meth:`Exchange.gather` does.

        ``copied``: it may be written into; else it may be what the model has.
        """
        if self._whole is not None:
            return self._whole
        try:
            self._layout, whole = self._gathered(well=well, copied=copied)
        except LayoutError as error:
            raise RunStopped(str(error)) from None
        if copied:
            self._whole = whole
        return whole

    def part(self, pick: Pick, *, well: bool) -> tuple[torch.Tensor, bool]:
        """The part of the whole that is picked, and whether it is only that; else as :meth:`whole`.

        What is exchanged is then the part alone. Where gradients go through it is the whole.
        """
        if self._whole is not None or (torch.is_grad_enabled() and self._piece.requires_grad):
            return self.whole(well=well), False
        try:
            found, x = self._exchange.gather_part(self._rule, self.piece(), pick, well=well)
        except LayoutError as error:
            raise RunStopped(str(error)) from None
        if isinstance(found, Layout):
            self._layout, self._whole = found, x
            return x, False
        self._part = found
        return x, True

    @property
    def may_be_apart(self) -> bool:
        """Whether what is done to each element by itself may be done to the pieces: none is an addend.

        Not if the whole is here anyway; and gradients go the ways of the whole, which were measured.
        """
        rule = self._rule
        summed = rule.addends or rule.row_addends
        return self._whole is None and not (torch.is_grad_enabled() or rule.refused or summed)

    def put_part(self, new: torch.Tensor) -> None:
        """Make a tensor the value of the part that was asked for last."""
        assert self._part is not None  # part() gave one
        rank = self._exchange.rank
        own = split(self._part.layout, rank, new)
        assert own is not None  # gather_part() refuses layouts in which a rank holds nothing
        self._piece = self._part.pasted(rank, self._piece, own)

    def _gathered(self, *, well: bool, copied: bool) -> tuple[Layout, torch.Tensor]:
        if self._gradient is None or not (torch.is_grad_enabled() and self._piece.requires_grad):
            return self._exchange.gather(self._rule, self._piece, well=well, copied=copied)
        layout, whole = self._exchange.gather(self._rule, self._piece.detach(), well=well)
        return layout, enter(self._piece, whole, layout, self._gradient, self._exchange)

    def put_whole(self, new: torch.Tensor) -> None:
        """Make a tensor the site's value."""
        self._whole, self._changed = new, True

    def piece(self) -> torch.Tensor:
        """The rank's piece; if the whole was changed, its own part of it."""
        if self._changed:
            assert self._layout is not None  # put_whole() follows whole()
            assert self._whole is not None
            self._piece, self._changed = self._own(self._layout, self._whole), False
        return self._piece

    def _own(self, layout: Layout, whole: torch.Tensor) -> torch.Tensor:
        if self._gradient is not None and torch.is_grad_enabled() and whole.requires_grad:
            return leave(whole, layout, self._gradient, self._exchange)
        own = split(layout, self._exchange.rank, whole)
        assert own is not None  # gather() refuses layouts in which a rank holds nothing
        return own

    def put_piece(self, new: torch.Tensor) -> None:
        """Make a tensor this rank's piece."""
        self._piece, self._whole, self._changed = new, None, False


def gradient_at(site: Site, original: torch.Tensor | None, rules: Mapping[Site, Rule]) -> Rule | None:
    """How the gradient of a forward's value lies, ``None`` if that is not known.

    ``original``: the value as the model has it. What leaves a DTensor or becomes one is differentiated
    in its placements, in which no gradient is a sum.
    """
    rule = rules.get(Site(site.path, f"grad_{site.port}", site.leaf))
    if rule is None or rule.refused:
        return None
    return replace(rule, addends=(), row_addends=()) if isinstance(original, DTensor) else rule
