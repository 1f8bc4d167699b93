"""Between the stages of a pipeline: the last one's result to all of them, and gradients back to the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flexmagic.engine.exchange import RunEnds, RunStopped
from flexmagic.engine.messages import Instead, check, packed, receive, send, unpacked
from flexmagic.engine.pipeline import Pipeline, Tape
from flexmagic.errors import ModelError


def from_the_last(model: Pipeline, make: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
    """What ``make`` returns on the last stage, on all of them; all stages call it together.

    If it fails on any stage, it does on all: there with its own error, elsewhere with :class:`RunStopped`.
    """
    stage, problem = model.stage, None
    mine: Sequence[torch.Tensor] | Instead = Instead.FAILED
    try:
        mine = make()
        check(mine)
    except BaseException as error:  # noqa: BLE001 - the other stages must hear of anything
        problem, mine = error, Instead.ENDED if isinstance(error, RunEnds) else Instead.FAILED
    if stage.is_last:
        others = range(-stage.stage_index, 0)
        for work in [w for n in others for w in send(model.group, model.peer(n), mine, stage.device)]:
            work.wait()
    else:
        mine = receive(model.group, model.peer(stage.num_stages - 1 - stage.stage_index), stage.device)
    if problem is not None:
        raise problem
    if mine is Instead.ENDED:
        raise RunEnds
    if isinstance(mine, Instead):
        raise RunStopped("another pipeline stage failed")
    return mine


_OUTPUT, _SAVED = "output", "saved "


def with_output(
    output: Any, context: Mapping[str, Any], attached: list[torch.Tensor], *, beside_it: int = 0
) -> torch.Tensor:
    """A message with a model's output and what hooks saved; see :func:`packed`."""
    saved = {f"{_SAVED}{name}": value for name, value in context.items()}
    return packed({_OUTPUT: output, **saved}, attached, beside_it=beside_it)


def of_output(tensors: Sequence[torch.Tensor]) -> tuple[Any, dict[str, Any]]:
    """The output and what hooks saved, out of such a message and what travelled beside it."""
    values, _ = unpacked(tensors)
    if _OUTPUT not in values:
        raise ModelError("What the last pipeline stage returns cannot be sent to the others.")
    output = values.pop(_OUTPUT)
    return output, {name.removeprefix(_SAVED): value for name, value in values.items()}


def backward(
    model: Pipeline, tape: Tape, last: Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]]
) -> None:
    """Carry gradients from the last stage to the first, through what each has on its tape.

    ``last``: on the last stage, tensors and their gradients to begin with. A stage that fails raises its
    own error, those before it :class:`RunStopped`.
    """
    stage, problem = model.stage, None
    gradients: Sequence[torch.Tensor] | Instead = Instead.FAILED
    try:
        if stage.is_last:
            roots, given = last()
        else:
            roots, given = tape.sent, _from_the_next(model)
        pairs = [(root, of) for root, of in zip(roots, given, strict=True) if root.requires_grad]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [of for _, of in pairs])
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in tape.arrived]
    except BaseException as error:  # noqa: BLE001 - the stages before must hear of anything
        problem = error
    if not stage.is_first:
        for work in send(model.group, model.peer(-1), gradients, stage.device):
            work.wait()
    if problem is not None:
        raise problem


def _from_the_next(model: Pipeline) -> list[torch.Tensor]:
    found = receive(model.group, model.peer(1), model.stage.device)
    if isinstance(found, Instead):
        raise RunStopped(f"pipeline stage {model.stage.stage_index + 1} failed")
    return found
