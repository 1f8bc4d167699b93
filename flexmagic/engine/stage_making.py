"""Pipelines out of what there is: torch's schedules and stages, and models that transformers cut."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from flexmagic.engine.pipeline import Pipeline
from flexmagic.engine.private import cut_by_transformers, schedule_plan
from flexmagic.errors import ModelError


def as_model(built: Any) -> nn.Module:
    """What a cell assigned to ``model``, or was loaded, as one module: of a pipeline a :class:`Pipeline`.

    Raises :class:`ModelError` for anything else, and for schedules that cannot be run here.
    """
    if isinstance(built, nn.Module):
        cut = cut_by_transformers(built)
        return built if cut is None else LoadedPipeline(_Cut(built, *cut), 1)
    if isinstance(built, PipelineScheduleMulti):
        raise ModelError(
            f"{type(built).__name__} has several pipeline stages per rank, which is not supported. "
            "Assign a schedule with one stage per rank, such as ScheduleGPipe or Schedule1F1B."
        )
    if isinstance(built, PipelineScheduleSingle):
        plan = schedule_plan(built)
        if plan.own_chunks:
            raise ModelError(
                "The schedule cuts its inputs by chunk specs of its own. Leave args_chunk_spec and "
                "kwargs_chunk_spec away: rows are cut along the first dim, all else goes to every stage."
            )
        return _pipeline(plan.stage, plan.micro_batches, plan.merge)
    if hasattr(built, "submod") and hasattr(built, "stage_index"):
        return _pipeline(built, 1, None)
    raise ModelError(
        f"the cell must assign a torch.nn.Module to `model`; it is {type(built).__name__}. "
        "For a pipeline, a schedule of torch.distributed.pipelining will do."
    )


def _pipeline(stage: Any, micro_batches: int, merge: Any) -> Pipeline:
    if not isinstance(stage, PipelineStage):
        raise ModelError(
            "Stages that torch's tracing front end made are not supported: their modules have other paths "
            "and may skip stages. Make a torch.distributed.pipelining.PipelineStage of each part."
        )
    if stage.num_stages != stage.group_size:
        raise ModelError(
            f"The pipeline has {stage.num_stages} stages over {stage.group_size} ranks. "
            "Give each rank of the stages' group one stage."
        )
    return Pipeline(stage, micro_batches, merge)


@dataclass
class _Cut:
    """A rank's stage of a model that transformers cut, under the names of torch's stages."""

    submod: nn.Module
    group: dist.ProcessGroup
    stage_index: int
    num_stages: int

    @property
    def device(self) -> torch.device:
        """Where the stage's parameters are."""
        return next(self.submod.parameters()).device

    @property
    def is_first(self) -> bool:
        """Whether it takes the model's input."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the model's output."""
        return self.stage_index == self.num_stages - 1

    @property
    def stage_index_to_group_rank(self) -> dict[int, int]:
        """The ranks, in the stages' group, of all stages."""
        return {n: n for n in range(self.num_stages)}


HEAD = frozenset({"labels", "logits_to_keep"})
"""What only the last stage takes, which has the head of the model."""


class LoadedPipeline(Pipeline):
    """A model that transformers cut into stages, each a whole model with stand-ins for what others have.

    Its own forward over the stages is not used: it passes no gradients, and a failure not at all.
    """

    def __init__(self, stage: Any, micro_batches: int) -> None:
        super().__init__(stage, micro_batches)
        vars(self.stage_module).pop("forward", None)
        named = inspect.signature(self.stage_module.forward).parameters
        self._named = None if any(p.kind == p.VAR_KEYWORD for p in named.values()) else set(named)

    def _called(self, received: Sequence[torch.Tensor], arguments: Mapping[str, Any]) -> Any:
        given = {
            name: value for name, value in arguments.items() if self._named is None or name in self._named
        }
        if received:
            given = {**given, "input_ids": None, "inputs_embeds": received[0]}
        model: Any = self.stage_module
        if self.stage.is_last:
            return model(**given)
        inside = getattr(model, model.base_model_prefix)
        return inside(**{name: value for name, value in given.items() if name not in HEAD}).last_hidden_state
