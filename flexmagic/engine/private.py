"""The few things that libraries do not tell publicly, each in one function; a test watches them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
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
