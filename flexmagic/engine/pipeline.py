"""A stage of torch.distributed.pipelining as the whole model: a batch in, its output on the last stage.

The forward is our own, not the schedule's: the stages' modules are called on the schedule's
micro-batches in its order, and every message says its shapes before it comes. So there is no extra
pass to infer shapes, an uneven last micro-batch and a new length need nothing rebuilt, unequal
sizes never meet, and a stage that fails is heard of by those after it instead of leaving them
waiting.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.microbatch import merge_chunks
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.tensor import DTensor

from flexmagic.engine.distributed import Loaded
from flexmagic.engine.exchange import RunStopped
from flexmagic.engine.messages import check, packed, receive, send, unpacked
from flexmagic.engine.private import schedule_plan
from flexmagic.engine.rows import batch_of
from flexmagic.engine.tensors import local_of
from flexmagic.engine.tree import Staged, unwrapped
from flexmagic.engine.twin import probe_inputs
from flexmagic.errors import InputError, ModelError
from flexmagic.layout.mesh import Mesh


class Pipeline(Staged):
    """One rank's stage and what it takes to run its part of a forward over all stages.

    ``forward`` takes the whole batch on every rank, of which only the first stage uses the rows;
    it returns the whole batch's output on the last stage and ``None`` on the others. All stages
    must call it together. It never records gradients.

    ``running``: the number of the micro-batch that the stage's module works on now, ``None``
    outside of it. ``pieces``: into how many the batch was cut. ``in_one_piece``: make it one, so
    that hooks see whole batches. ``context``: what hooks save, which then goes along from stage to stage.
    """

    def __init__(self, stage: PipelineStage, micro_batches: int, merge: Any = None) -> None:
        super().__init__(stage.submod)
        self.stage = stage
        self.micro_batches = micro_batches
        self.config: Any = None
        self.running: int | None = None
        self.pieces = 1
        self.in_one_piece = False
        self.context: dict[str, Any] | None = None
        self._merge = merge

    def forward(self, **arguments: Any) -> Any:
        """The output for the whole batch on the last stage, ``None`` on the others."""
        self.pieces = 1 if self.in_one_piece else min(self.micro_batches, batch_of(arguments))
        group = self.stage.group if self.stage.group is not None else dist.group.WORLD
        assert group is not None  # a stage is made after the process group
        outputs, pending, problem = [], list[Any](), None
        given = _cut(arguments, self.pieces)
        try:
            for n in range(self.pieces):
                self.running = n
                sent: Sequence[torch.Tensor] | None = None
                try:
                    output = self._turn(group, given[n], idle=problem is not None)
                    if self.stage.is_last:
                        outputs.append(output)
                    elif problem is None:
                        sent = self._tensors(output)
                except BaseException as error:  # noqa: BLE001 - the stages after this one must hear of anything
                    problem = problem or error
                if not self.stage.is_last:
                    pending += send(group, self._peer(1), sent, self.stage.device)
        finally:
            self.running = None
        for work in pending:
            work.wait()
        if problem is not None:
            raise problem
        return self._merged(outputs) if self.stage.is_last else None

    @property
    def _carries(self) -> bool:
        return self.context is not None and self.pieces == 1

    def _peer(self, step: int) -> int:
        """The rank, in the stages' group, of the stage before or after this one."""
        return self.stage.stage_index_to_group_rank[self.stage.stage_index + step]

    def _turn(self, group: dist.ProcessGroup, arguments: Mapping[str, Any], *, idle: bool) -> Any:
        """One micro-batch through the stage's module.

        ``idle``: after a failure what comes is still taken, so that it does not wait for another run.
        """
        received: Sequence[torch.Tensor] | None = ()
        if not self.stage.is_first:
            received = receive(group, self._peer(-1), self.stage.device)
        if received is None:
            raise RunStopped(f"pipeline stage {self.stage.stage_index - 1} failed")
        if idle:
            return None
        if self._carries and received:
            *received, saved = received
            assert self.context is not None  # that is what carrying means
            self.context.update(unpacked(saved))
        args, kwargs = self._inputs(received, arguments)
        with torch.no_grad():
            return self.stage_module(*args, **kwargs)

    def _inputs(
        self, received: Sequence[torch.Tensor], arguments: Mapping[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """What this stage's module is called with.

        The first tensor of the arguments is what the first stage works on, by position if its
        ``forward`` has another name for it; later stages get what was received in its place. All
        other arguments go to every stage that takes them, and the first must take them.
        """
        parameters = inspect.signature(unwrapped(self.stage_module).forward).parameters.values()
        places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        anything = any(p.kind == p.VAR_KEYWORD for p in parameters)
        batch = next((name for name, value in arguments.items() if isinstance(value, torch.Tensor)), None)
        args = list(received)
        if self.stage.is_first and batch not in named and places[:1] and places[0] not in arguments:
            args = [arguments[batch]] if batch is not None else []
        rest = {
            name: value for name, value in arguments.items() if name != batch or batch in named or not args
        }
        taken = named - set(places[: len(args)])
        kwargs = {
            name: value for name, value in rest.items() if name in taken or (anything and name not in named)
        }
        # without a cache a model that has none does what one that has it does
        others = [name for name in rest if name not in kwargs and name != "use_cache"]
        if self.stage.is_first and others:
            takes = ", ".join(sorted(named)) or "nothing"
            raise InputError(f"the first pipeline stage does not take {', '.join(others)}; it takes {takes}")
        return args, kwargs

    def _tensors(self, output: Any) -> list[torch.Tensor]:
        """What goes to the next stage, as plain tensors."""
        values = list(output) if isinstance(output, (tuple, list)) else [output]
        for value in values:
            if not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
                raise ModelError(
                    f"pipeline stage {self.stage.stage_index} returns {type(value).__name__}; a stage before "
                    "the last must return a plain tensor or a tuple of them"
                )
        tensors = [local_of(value) for value in values]
        if self._carries:
            tensors.append(packed(self.context or {}).to(self.stage.device))
        check(tensors)
        return tensors

    def _merged(self, outputs: list[Any]) -> Any:
        return outputs[0] if len(outputs) == 1 else merge_chunks(outputs, self._merge)


def _cut(arguments: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
    """The arguments of each micro-batch: rows as ``torch.tensor_split`` cuts them, all else for all."""
    batch = batch_of(arguments)
    cut = {
        name: value.tensor_split(pieces)
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch
        else (value,) * pieces
        for name, value in arguments.items()
    }
    return [{name: values[n] for name, values in cut.items()} for n in range(pieces)]


def as_model(built: Any) -> nn.Module:
    """What a cell assigned to ``model``, as one module: a schedule or stage as a :class:`Pipeline`.

    Raises :class:`ModelError` for anything else, and for schedules that cannot be run here.
    """
    if isinstance(built, nn.Module):
        return built
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


@contextlib.contextmanager
def whole_batches(model: nn.Module) -> Iterator[None]:
    """Let a pipeline take batches in one piece; any other model does so anyway."""
    if not isinstance(model, Pipeline):
        yield
        return
    model.in_one_piece = True
    try:
        yield
    finally:
        model.in_one_piece = False


def cuts_batches(model: nn.Module) -> bool:
    """Whether a model works on a batch in several pieces: on all stages of a pipeline alike."""
    return isinstance(model, Pipeline) and model.micro_batches > 1


@dataclass(frozen=True)
class Standing:
    """Where a rank stands in a pipeline: plain data that all ranks compare before they run it.

    ``line``: the ranks of the stages it meets, by stage. ``guessable``: whether its part says what
    input the model takes.
    """

    stage: int
    micro_batches: int
    line: tuple[int, ...]
    guessable: bool = False


def standing(model: nn.Module) -> Standing | None:
    """Where this rank stands; ``None`` for a model that is no :class:`Pipeline`."""
    if not isinstance(model, Pipeline):
        return None
    stage = model.stage
    ranks = dist.get_process_group_ranks(stage.group)
    line = tuple(ranks[stage.stage_index_to_group_rank[n]] for n in range(stage.num_stages))
    return Standing(stage.stage_index, model.micro_batches, line, probe_inputs(model, 1, 1) is not None)


def check_standings(standings: Sequence[Standing | None]) -> None:
    """Raise :class:`ModelError`, on all ranks alike, if the ranks' parts are not those of pipelines."""
    without = [str(rank) for rank, s in enumerate(standings) if s is None]
    if without and len(without) < len(standings):
        raise ModelError(
            f"Rank {', '.join(without)} assigned a module where the others have pipeline stages. "
            "Assign the schedule on every rank."
        )
    for rank, mine in enumerate(standings):
        if mine is None:
            continue
        others = [standings[peer] for peer in mine.line]
        if mine.line[mine.stage] != rank or any(s is None or s.line != mine.line for s in others):
            raise ModelError(
                f"Rank {rank} is stage {mine.stage} of a pipeline over ranks {list(mine.line)}, "
                "but not all of them say so. Give all stages of a pipeline the same group."
            )
        counts = [s.micro_batches for s in others if s is not None]
        if len(set(counts)) > 1:
            raise ModelError(f"The stages' schedules have different numbers of micro-batches: {counts}.")


def stage_mates(standings: Sequence[Standing | None], rank: int) -> frozenset[int] | None:
    """The ranks that hold the same stage as ``rank``; ``None`` where there is no pipeline."""
    mine = standings[rank]
    if mine is None:
        return None
    return frozenset(n for n, s in enumerate(standings) if s is not None and s.stage == mine.stage)


def settled(loaded: Loaded, standings: Sequence[Standing | None]) -> Loaded:
    """A pipeline as all ranks know it alike: its configuration if all have one, and its mesh.

    The mesh of a cell that was not told any has one axis over all ranks; here it gets its name.
    """
    if not isinstance(loaded.model, Pipeline):
        return loaded
    if all(s is not None and s.guessable for s in standings):
        loaded.model.config = unwrapped(loaded.model).config
    lines = {s.line for s in standings if s is not None}
    if len(loaded.mesh.axes) == 1 and {len(line) for line in lines} == {loaded.mesh.size}:
        return replace(loaded, mesh=Mesh.of(pp=loaded.mesh.size))
    return loaded
