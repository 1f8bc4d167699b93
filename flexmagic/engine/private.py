"""The few things that libraries do not tell publicly, each in one function; a test watches them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.schedules import PipelineScheduleSingle


def fsdp_ranks(module: FSDPModule) -> tuple[int, ...] | None:
    """The ranks over which ``fully_shard`` shares out data, replicas of shards first."""
    state: Any = module._get_fsdp_state()  # noqa: SLF001
    group = state._fsdp_param_group  # noqa: SLF001
    if group is None:
        return None
    return tuple(int(rank) for rank in group.mesh_info.mesh.mesh.flatten())


def deepspeed_ranks() -> tuple[int, ...]:
    """The ranks over which DeepSpeed shares out data."""
    groups: Any = importlib.import_module("deepspeed.utils.groups")

    return tuple(dist.get_process_group_ranks(groups._get_data_parallel_group()))  # noqa: SLF001


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape; of one that DeepSpeed shares out, which is empty at rest, that of the whole."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def at_rest(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank keeps of a parameter between forwards: of one that DeepSpeed shares out, its share."""
    share = getattr(parameter, "ds_tensor", None)
    return parameter if share is None else cast("torch.Tensor", share)


def come_to_rest(model: nn.Module) -> None:
    """Have ``fully_shard`` keep only this rank's shards again, whatever a forward that was cut off left."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group: Any = module._get_fsdp_state()._fsdp_param_group  # noqa: SLF001
            if group is not None:
                group._all_gather_result = None  # noqa: SLF001
            module.reshard()


@contextlib.contextmanager
def kept_whole(units: Sequence[FSDPModule]) -> Iterator[None]:
    """Units of ``fully_shard``, the first whole in a block, all as they were after it; all ranks enter."""
    groups: list[Any] = [unit._get_fsdp_state()._fsdp_param_group for unit in units]  # noqa: SLF001
    before = [group is not None and bool(group.is_unsharded) for group in groups]
    try:
        for unit in units[:1]:
            unit.unshard()
        yield
    finally:
        for unit, whole in zip(units, before, strict=True):
            if whole:
                unit.unshard()
            else:
                unit.reshard()


def gathered(parameter: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """The whole of one parameter that DeepSpeed has shared out, on all ranks, which enter it together.

    Nothing happens to any other parameter.
    """
    if not hasattr(parameter, "ds_status"):
        return contextlib.nullcontext()
    deepspeed: Any = importlib.import_module("deepspeed")
    return cast("contextlib.AbstractContextManager[Any]", deepspeed.zero.GatheredParameters([parameter]))


@dataclass(frozen=True)
class SchedulePlan:
    """What a pipeline schedule was made with; ``own_chunks``: chunk specs were given."""

    stage: Any
    micro_batches: int
    own_chunks: bool
    merge: Any


def schedule_plan(schedule: PipelineScheduleSingle) -> SchedulePlan:
    """The stage, number of micro-batches, chunk and merge specs of a schedule with one stage per rank."""
    own = schedule._args_chunk_spec is not None or schedule._kwargs_chunk_spec is not None  # noqa: SLF001
    return SchedulePlan(schedule._stage, schedule._n_microbatches, own, schedule._output_merge_spec)  # noqa: SLF001


def cut_by_transformers(model: nn.Module) -> tuple[dist.ProcessGroup, int, int] | None:
    """The stages' group, this stage's place among them and their number, of a model that transformers cut."""
    stage: Any = getattr(model, "_pp_stage", None)
    return None if stage is None else (stage.pp_group, stage.pp_rank, stage.pp_size)
