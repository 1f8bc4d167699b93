"""Which rank works on which rows of a batch: found on what makes the model data-parallel."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from flexmagic.engine.private import deepspeed_ranks, fsdp_ranks
from flexmagic.layout.mesh import DATA_AXES, Mesh
from flexmagic.layout.rule import Extent, Rule


def data_ranks(model: nn.Module) -> tuple[int, ...] | None:
    """The ranks among which a model's wrappers share out the batch, this one included.

    ``None`` if nothing about the model is data-parallel.
    """
    sharer = _sharer(model)
    if sharer is None:
        return None
    if isinstance(sharer, FSDPModule):
        return fsdp_ranks(sharer)
    if isinstance(sharer, (DistributedDataParallel, FullyShardedDataParallel)):
        return tuple(dist.get_process_group_ranks(sharer.process_group))
    return deepspeed_ranks()


def kind_of_sharing(model: nn.Module) -> str:
    """By what a model's batch is shared out over ranks, as found on the model; ``""`` for nothing.

    What a model is may be other than what was asked for: Accelerate's FSDP is DDP on a CPU.
    """
    sharer: Any = _sharer(model)
    if sharer is None:
        return ""
    if isinstance(sharer, DistributedDataParallel):
        return "DistributedDataParallel, all weights on every rank"
    if isinstance(sharer, FullyShardedDataParallel):
        return "FullyShardedDataParallel (FSDP1)"
    if isinstance(sharer, FSDPModule):
        return "fully_shard (FSDP2)"
    return f"DeepSpeed ZeRO stage {sharer.zero_optimization_stage()}"


def _sharer(model: nn.Module) -> nn.Module | None:
    """The outermost module that makes a model data-parallel."""
    kinds: list[type[Any]] = [DistributedDataParallel, FullyShardedDataParallel, FSDPModule]
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        kinds.append(deepspeed.DeepSpeedEngine)
    return next((module for module in model.modules() if isinstance(module, tuple(kinds))), None)


def row_groups(mesh: Mesh, lines: Sequence[tuple[int, ...] | None]) -> tuple[int, ...]:
    """The data group of every rank, counted from 0: ranks of one group get the same rows.

    ``lines``: per rank what :func:`data_ranks` found there. Without any, the mesh's data axes say it.
    """
    if any(line is not None for line in lines):
        return tuple(0 if line is None else line.index(rank) for rank, line in enumerate(lines))
    out = []
    for rank in range(mesh.size):
        group = 0
        for axis, n, at in zip(mesh.axes, mesh.shape, mesh.coordinate(rank), strict=True):
            if axis in DATA_AXES:
                group = group * n + at
        out.append(group)
    return tuple(out)


def batch_of(arguments: Mapping[str, Any]) -> int:
    """The number of rows of a forward's arguments: that of the first tensor with dims; 1 without any."""
    return next((len(v) for v in arguments.values() if isinstance(v, torch.Tensor) and v.ndim), 1)


def share(arguments: Mapping[str, Any], group: int, groups: int) -> tuple[dict[str, Any], bool]:
    """A data group's share of a batch, and whether it was shared out at all.

    Rows go to the groups in order, as evenly as ``torch.tensor_split`` does. Arguments that are not
    as long as the batch go to all; so does a batch with fewer rows than groups.
    """
    batch = batch_of(arguments)
    if groups == 1 or batch < groups:
        return dict(arguments), False
    return {
        name: value.tensor_split(groups)[group]
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch
        else value
        for name, value in arguments.items()
    }, True


def extent_of(
    arguments: Mapping[str, Any], *, shared_out: bool, surveyed: Collection[str] | None = None
) -> Extent:
    """The rows of a whole batch, and the tokens per row where it consists of token ids.

    ``surveyed``: the arguments that the survey gave, ``None`` where they were the user's own.
    """
    ids, batch = arguments.get("input_ids"), batch_of(arguments)
    seq = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.ndim == 2 else None
    more = {
        name
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch
    }
    by_row = () if surveyed is None else tuple(sorted(more.difference(surveyed)))
    return Extent(batch, seq, shared_out, by_row=by_row)


def copies_of_a_row(arguments: Mapping[str, Any], row: int, copies: int) -> dict[str, Any]:
    """Arguments whose rows are all the same one of the given batch; see :func:`rows_from`."""
    return _rows(arguments, [row] * copies)


def rows_from(arguments: Mapping[str, Any], row: int, count: int) -> dict[str, Any]:
    """Arguments with so many rows of the given batch, from one on.

    After its last row follows its first again, in a form of other values and none that were not there.
    """
    return _rows(arguments, list(range(row, row + count)))


def with_a_row_more(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments whose last row stands there twice."""
    batch = batch_of(arguments)
    return _rows(arguments, [*range(batch), batch - 1])


def _rows(arguments: Mapping[str, Any], picked: list[int]) -> dict[str, Any]:
    batch = batch_of(arguments)
    return {
        name: torch.stack([_varied(value[row % batch], row // batch) for row in picked])
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch
        else value
        for name, value in arguments.items()
    }


def _varied(row: torch.Tensor, places: int) -> torch.Tensor:
    """The row turned by some places, every second of its values then replaced by the first."""
    if not places or not row.ndim:
        return row
    varied = row.roll(places, 0)
    varied[1::2] = varied[:1]
    return varied


class NoRows(Exception):  # noqa: N818 - a reason to make one forward for each of several, which no user sees
    """A site's rows are not the traces' own."""


def rows_dim(rule: Rule) -> int | None:
    """The dim that counts rows, or their tokens; ``None`` for none. Raises :class:`NoRows` for several."""
    found = [at for at, dim in enumerate(rule.dims) if dim.size is None and "batch" in dim.name]
    if len(found) > 1 or rule.together:
        raise NoRows(str(rule.site))
    return found[0] if found else None
