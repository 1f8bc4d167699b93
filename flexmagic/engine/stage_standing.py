"""Where the ranks of a pipeline stand: compared before they run, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import nn

from flexmagic.engine.distributed import Loaded
from flexmagic.engine.pipeline import Pipeline
from flexmagic.engine.tree import unwrapped
from flexmagic.engine.twin import probe_inputs
from flexmagic.errors import ModelError
from flexmagic.layout.mesh import Mesh


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
