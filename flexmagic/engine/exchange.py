"""Bringing the pieces of one site to every rank, after all ranks agreed on what they exchange.

A header goes first: whether this rank is well, which site, which local shape. Only when all
headers fit do payloads follow, so that unequal sizes never meet in a collective, and an error on
one rank ends the run on all of them at the same place.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flexmagic.engine.tensors import as_bytes
from flexmagic.errors import LayoutError
from flexmagic.layout.assemble import assemble
from flexmagic.layout.layout import Layout
from flexmagic.layout.survey import Rule

_MAX_DIMS = 8
_HEADER = 3 + _MAX_DIMS


class RunStopped(Exception):  # noqa: N818 - a signal between ranks, not an error a user sees
    """All ranks agreed to end the run here; ``reason`` is empty if some hook's error is recorded."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Exchange:
    """Exchanges over one group: every rank of it must call at the same places."""

    group: dist.ProcessGroup
    rank: int
    world_size: int

    def gather(self, rule: Rule, local: torch.Tensor, *, well: bool) -> tuple[Layout, torch.Tensor]:
        """The layout and the whole tensor of a site from this rank's local piece.

        ``well``: whether nothing failed on this rank so far. Raises :class:`RunStopped` on all
        ranks alike if any is not, or if they are not at the same site; a
        :class:`~flexmagic.errors.LayoutError` on all alike if the shapes do not follow the rule.
        """
        layout = rule.local_layout(self._agree(rule, local, well=well))
        if layout.replicated:
            return layout, local.clone()
        return layout, assemble(layout, self._pieces(layout, local))

    def _agree(self, rule: Rule, local: torch.Tensor, *, well: bool) -> list[tuple[int, ...] | None]:
        if local.ndim > _MAX_DIMS:
            msg = (
                f"{rule.site} has {local.ndim} dims; whole tensors of more than {_MAX_DIMS} are not supported"
            )
            raise LayoutError(msg)
        name = zlib.crc32(f"{rule.site}|{local.dtype}".encode())
        sizes = list(local.shape) + [0] * (_MAX_DIMS - local.ndim)
        mine = torch.tensor([int(well), name, local.ndim, *sizes], dtype=torch.int64)
        everyone = [torch.empty(_HEADER, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self.group)
        headers = [[int(n) for n in header] for header in everyone]
        if not all(header[0] for header in headers):
            raise RunStopped
        if len({header[1] for header in headers}) > 1:
            msg = f"the ranks are not at the same site with the same dtype; this rank is at {rule.site}"
            raise RunStopped(msg)
        return [tuple(header[3 : 3 + header[2]]) for header in headers]

    def _pieces(self, layout: Layout, local: torch.Tensor) -> dict[int, torch.Tensor]:
        mine = local.contiguous()
        owners = layout.owners()
        pieces = {self.rank: mine}
        pending = []
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            if self.rank in owners:
                pending.append(dist.isend(as_bytes(mine), group=self.group, group_dst=rank))
            if rank in owners:
                shape = layout.local_shape(rank)
                assert shape is not None  # an owner holds something
                pieces[rank] = torch.empty(shape, dtype=mine.dtype, device=mine.device)
                pending.append(dist.irecv(as_bytes(pieces[rank]), group=self.group, group_src=rank))
        for work in pending:
            if work is not None:
                work.wait()
        return pieces
