"""Bringing the pieces of one site to every rank, after all ranks agreed on what they exchange.

A header goes first: whether this rank is well, which site, which local shape. Only when all
headers fit do payloads follow, so that unequal sizes never meet in a collective, and an error on
one rank ends the run on all of them at the same place.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist

from flexmagic.engine.outboxes import LEFT, MOST, NEVER, Outboxes
from flexmagic.engine.tensors import as_bytes
from flexmagic.errors import LayoutError
from flexmagic.layout.assemble import assemble, own_part
from flexmagic.layout.layout import Layout
from flexmagic.layout.part import Part, Places
from flexmagic.layout.rule import Extent, Rule

_MAX_DIMS = 8

Pick = Callable[[Layout], Places | None]
"""Which part of a whole is meant, by how it lies; ``None`` for all of it."""


class RunStopped(Exception):  # noqa: N818 - a signal between ranks, not an error a user sees
    """All ranks agreed to end the run here; ``reason`` is empty if some hook's error is recorded."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class RunEnds(BaseException):
    """A run has reached the site at which it was to end: on all ranks alike, and no error."""


@dataclass(frozen=True)
class _Header:
    """What a rank tells before anything else is exchanged; ``left``: see :mod:`flexmagic.engine.outboxes`."""

    well: int
    name: int
    machine: int
    left: int
    shape: tuple[int, ...]

    def numbers(self) -> torch.Tensor:
        sizes = list(self.shape) + [0] * (_MAX_DIMS - len(self.shape))
        return torch.tensor([self.well, self.name, self.machine, self.left, len(self.shape), *sizes])

    @classmethod
    def read(cls, numbers: torch.Tensor) -> Self:
        well, name, machine, left, ndim, *sizes = numbers.tolist()
        return cls(well, name, machine, left, tuple(sizes[:ndim]))


@dataclass(frozen=True)
class Exchange:
    """Exchanges over one group: every rank that holds a site must call at the same places.

    ``extent``: what the run's input is, as a whole. ``mates``: the ranks of the same pipeline stage,
    where there are stages: others are never waited for. ``outboxes``: those of the group.
    """

    group: dist.ProcessGroup
    rank: int
    extent: Extent = field(default_factory=Extent)
    mates: frozenset[int] | None = None
    outboxes: Outboxes = field(default_factory=Outboxes)

    def gather(
        self, rule: Rule, local: torch.Tensor, *, well: bool, copied: bool = True
    ) -> tuple[Layout, torch.Tensor]:
        """The layout and the whole tensor of a site from this rank's local piece.

        ``well``: whether nothing failed on this rank so far. ``copied``: not ``local`` itself, where every
        rank has the whole. Raises :class:`RunStopped` on all
        ranks that hold the site alike if any is not, or if they are not at the same site; a
        :class:`~flexmagic.errors.LayoutError` on all alike if the shapes do not follow the rule.
        """
        rule = self._among_mates(rule)
        if self._has_all(rule):
            return self._own_layout(rule, local), local.clone() if copied else local
        graph = torch.is_grad_enabled() and local.requires_grad
        by_all = len(rule.ranks) == dist.get_world_size(self.group)
        left = NEVER if graph or not by_all else self.outboxes.leave(local, self.rank)
        headers = self._agree(rule, local, left, well=well)
        layout = self._layout(rule, headers)
        if layout.replicated:
            return layout, local.clone()
        if graph:
            return layout, _Whole.apply(local, layout, self)
        said = {header.left for header in headers.values()}
        if said == {LEFT}:
            pieces = self.outboxes.pieces({r: headers[r].shape for r in layout.owners()}, local.dtype)
            self.outboxes.next()
            return layout, assemble(layout, pieces)
        whole = self.joined(layout, local)
        largest = max(math.prod(header.shape) for header in headers.values()) * local.itemsize
        if NEVER not in said and largest <= MOST and len({h.machine for h in headers.values()}) == 1:
            self.outboxes.make(largest, self.rank, lambda numbers: self._told(rule.ranks, numbers))
        return layout, whole

    def gather_part(
        self, rule: Rule, local: torch.Tensor, pick: Pick, *, well: bool
    ) -> tuple[Part, torch.Tensor] | tuple[Layout, torch.Tensor]:
        """A part of a site's whole, if one is picked, else all of it; raises as :meth:`gather` does.

        No more than the part is exchanged. ``pick`` must say the same on all ranks.
        """
        rule = self._among_mates(rule)
        if self._has_all(rule):
            layout = self._own_layout(rule, local)
        else:
            layout = self._layout(rule, self._agree(rule, local, NEVER, well=well))
        picked = pick(layout)
        if picked is None:
            return layout, local.clone() if layout.replicated else self.joined(layout, local)
        part = Part.of(layout, picked)
        own = part.cut(self.rank, local)
        if layout.replicated:
            return part, own.clone(memory_format=torch.contiguous_format)
        return part, self.joined(part.layout, own)

    def joined(self, layout: Layout, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor from every rank's piece of it."""
        return assemble(layout, self._pieces(layout, local))

    def own_share(self, layout: Layout, gradient: torch.Tensor) -> torch.Tensor:
        """The sum, at this rank's piece, of all ranks' gradients of the whole, each of its own use of it."""
        parts = {rank: _cut(layout, rank, gradient) for rank in layout.ranks}
        mine = parts[self.rank]
        arriving = {rank: torch.empty_like(mine) for rank in layout.ranks if rank != self.rank}
        self._meet(
            {rank: as_bytes(part) for rank, part in parts.items()},
            {rank: as_bytes(part) for rank, part in arriving.items()},
        )
        for rank in sorted(arriving):
            mine = mine + arriving[rank]
        return mine

    def _among_mates(self, rule: Rule) -> Rule:
        if self.mates is not None and rule.site.path:  # what the root takes, all stages have at once
            return rule.among(self.mates)
        return rule

    def _has_all(self, rule: Rule) -> bool:
        """Whether every rank has the whole, so that none has to tell another anything.

        A failure on one of them then ends the run where ranks meet next, or after it; and whether all
        left the same in the tensor, the client sees of the sums.
        """
        return rule.replicated and not rule.refused and not (rule.splits and self.extent.shared_out)

    def _own_layout(self, rule: Rule, local: torch.Tensor) -> Layout:
        shape = tuple(local.shape)
        shapes = [shape if rank in rule.ranks else None for rank in range(rule.mesh.size)]
        return rule.local_layout(shapes, self.extent)

    def _layout(self, rule: Rule, headers: dict[int, _Header]) -> Layout:
        shapes = [headers[rank].shape if rank in headers else None for rank in range(rule.mesh.size)]
        return rule.local_layout(shapes, self.extent)

    def _agree(self, rule: Rule, local: torch.Tensor, left: int, *, well: bool) -> dict[int, _Header]:
        """What every rank tells, once all said that they are well and at the same site."""
        if local.ndim > _MAX_DIMS:
            msg = (
                f"{rule.site} has {local.ndim} dims; whole tensors of more than {_MAX_DIMS} are not supported"
            )
            raise LayoutError(msg)
        name = zlib.crc32(f"{rule.site}|{local.dtype}".encode())
        mine = _Header(int(well), name, self.outboxes.machine, left, tuple(local.shape))
        told = self._told(rule.ranks, mine.numbers())
        headers = {rank: _Header.read(numbers) for rank, numbers in told.items()}
        if not all(header.well for header in headers.values()):
            raise RunStopped
        if len({header.name for header in headers.values()}) > 1:
            msg = f"the ranks are not at the same site with the same dtype; this rank is at {rule.site}"
            raise RunStopped(msg)
        return headers

    def _told(self, ranks: Sequence[int], mine: torch.Tensor) -> dict[int, torch.Tensor]:
        """What every one of some ranks tells; all tell as many numbers."""
        everyone = {rank: torch.empty_like(mine) for rank in ranks}
        everyone[self.rank] = mine
        self._meet(dict.fromkeys(ranks, mine), everyone)
        return everyone

    def _pieces(self, layout: Layout, local: torch.Tensor) -> dict[int, torch.Tensor]:
        """The owners' pieces by rank; every rank of the layout sends and receives."""
        mine = local.contiguous()
        owners = layout.owners()
        pieces = {}
        for rank in owners:
            shape = layout.local_shape(rank)
            assert shape is not None  # an owner holds something
            pieces[rank] = (
                mine if rank == self.rank else torch.empty(shape, dtype=mine.dtype, device=mine.device)
            )
        outgoing = dict.fromkeys(layout.ranks, as_bytes(mine)) if self.rank in owners else {}
        self._meet(outgoing, {rank: as_bytes(piece) for rank, piece in pieces.items()})
        return pieces

    def _meet(self, outgoing: dict[int, torch.Tensor], incoming: dict[int, torch.Tensor]) -> None:
        """Send to and receive from other ranks, all at once; pairs of ranks meet in the same order.

        What is empty is not sent: both sides know how much there is.
        """
        pending = [
            dist.isend(tensor, group=self.group, group_dst=rank)
            for rank, tensor in outgoing.items()
            if rank != self.rank and tensor.numel()
        ]
        pending += [
            dist.irecv(tensor, group=self.group, group_src=rank)
            for rank, tensor in incoming.items()
            if rank != self.rank and tensor.numel()
        ]
        for work in pending:
            if work is not None:
                work.wait()


class _Whole(torch.autograd.Function):
    """The whole tensor out of pieces, and back: each piece gets the gradient of all uses of it."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, layout: Layout, exchange: Exchange) -> torch.Tensor:
        if not layout.partial and len(set(layout.blocks)) < len(layout.ranks):
            msg = "a run with gradients cannot edit a site of which ranks share pieces"
            raise RunStopped(msg)
        ctx.layout, ctx.exchange = layout, exchange
        return exchange.joined(layout, local)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.exchange.own_share(ctx.layout, gradient), None, None


def _cut(layout: Layout, rank: int, whole: torch.Tensor) -> torch.Tensor:
    """A rank's part of a gradient of the whole: that of an addend is that of the sum."""
    shape = layout.local_shape(rank)
    assert shape is not None  # asked only of ranks that hold something
    piece = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    for there, here in own_part(layout, rank):
        piece[here] = whole[there]
    return piece
