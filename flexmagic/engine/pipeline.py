"""A stage of a pipeline as the whole model: a batch in, its output on the last stage.

The forward is our own, not a schedule's: the stages' modules are called on the schedule's
micro-batches in its order, and every message says its shapes before it comes. So there is no extra
pass to infer shapes, an uneven last micro-batch and a new length need nothing rebuilt, unequal
sizes never meet, and a stage that fails is heard of by those after it instead of leaving them
waiting. Gradients come back the same way, on what a :class:`Tape` has kept.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining.microbatch import merge_chunks
from torch.distributed.tensor import DTensor

from flexmagic.engine.exchange import RunEnds, RunStopped
from flexmagic.engine.messages import Instead, check, packed, receive, send, unpacked
from flexmagic.engine.rows import batch_of
from flexmagic.engine.tensors import local_of
from flexmagic.engine.tree import Staged, unwrapped
from flexmagic.errors import InputError, ModelError


@dataclass
class Tape:
    """What gradients come back through: the tensors that arrived from the stage before and went on."""

    arrived: list[torch.Tensor] = field(default_factory=list)
    sent: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Turns:
    """What is done before this stage's turn in a forward, and after it, before the next stage's."""

    before: Callable[[], None]
    after: Callable[[BaseException | None], None]


class Pipeline(Staged):
    """One rank's stage and what it takes to run its part of a forward over all stages.

    ``forward`` takes the whole batch on every rank, of which only the first stage uses the rows;
    it returns the whole batch's output on the last stage and ``None`` on the others. All stages
    must call it together.

    ``running``: the number of the micro-batch that the stage's module works on now, ``None``
    outside of it. ``pieces``: into how many the batch was cut. ``in_one_piece``: make it one, so
    that hooks see whole batches. ``context``: what hooks save, which then goes along from stage to stage.
    ``tape``: takes what a backward needs, of a batch in one piece. ``turns``: of a trace.
    """

    def __init__(self, stage: Any, micro_batches: int, merge: Any = None) -> None:
        super().__init__(stage.submod)
        self.stage = stage
        self.micro_batches = micro_batches
        self.config: Any = None
        self.running: int | None = None
        self.pieces = 1
        self.in_one_piece = False
        self.context: dict[str, Any] | None = None
        self.tape: Tape | None = None
        self.turns: Turns | None = None
        self._merge = merge

    def forward(self, **arguments: Any) -> Any:
        """The output for the whole batch on the last stage, ``None`` on the others."""
        self.pieces = 1 if self.in_one_piece else min(self.micro_batches, batch_of(arguments))
        outputs, pending, problem = [], list[Any](), None
        given = _cut(arguments, self.pieces)
        try:
            for n in range(self.pieces):
                self.running = n
                sent: Sequence[torch.Tensor] | Instead = Instead.FAILED
                try:
                    output = self._turn(given[n], idle=problem is not None)
                    if self.stage.is_last:
                        outputs.append(output)
                    elif problem is None:
                        sent = self._tensors(output)
                except BaseException as error:  # noqa: BLE001 - the stages after this one must hear of anything
                    problem = problem or error
                if not self.stage.is_last:
                    sent = Instead.ENDED if isinstance(problem, RunEnds) else sent
                    pending += send(self.group, self.peer(1), sent, self.stage.device)
        finally:
            self.running = None
        for work in pending:
            work.wait()
        if problem is not None:
            raise problem
        return self._merged(outputs) if self.stage.is_last else None

    @property
    def group(self) -> dist.ProcessGroup:
        """The stages' group."""
        group = self.stage.group if self.stage.group is not None else dist.group.WORLD
        assert group is not None  # a stage is made after the process group
        return group

    @property
    def _carries(self) -> bool:
        return self.context is not None and self.pieces == 1

    def peer(self, step: int) -> int:
        """The rank, in the stages' group, of the stage so many before or after this one."""
        rank: int = self.stage.stage_index_to_group_rank[self.stage.stage_index + step]
        return rank

    def _turn(self, arguments: Mapping[str, Any], *, idle: bool) -> Any:
        """One micro-batch through the stage's module.

        ``idle``: after a failure what comes is still taken, so that it does not wait for another run.
        """
        if self.turns is None:
            return self._work(arguments, idle=idle)
        problem: BaseException | None = None
        try:
            self.turns.before()
        except BaseException as error:  # noqa: BLE001 - what comes is still taken
            problem = error
        try:
            output = self._work(arguments, idle=idle or problem is not None)
        except BaseException as error:  # noqa: BLE001 - the other stages must hear of anything
            problem = problem or error
        self.turns.after(problem)
        if problem is not None:
            raise problem
        return output

    def _work(self, arguments: Mapping[str, Any], *, idle: bool) -> Any:
        received: Sequence[torch.Tensor] | Instead = ()
        if not self.stage.is_first:
            received = receive(self.group, self.peer(-1), self.stage.device)
        if received is Instead.ENDED:
            raise RunEnds
        if isinstance(received, Instead):
            raise RunStopped(f"pipeline stage {self.stage.stage_index - 1} failed")
        return None if idle else self._called(self._arrived(received), arguments)

    def _arrived(self, received: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """What the stage's module gets of a message; the rest is what hooks saved."""
        if self.tape is not None and torch.is_grad_enabled():
            self.tape.arrived = [tensor.requires_grad_() for tensor in received if _differentiable(tensor)]
            # the stage may write into what it gets, as no leaf of a graph allows
            received = [tensor.clone() if tensor.requires_grad else tensor for tensor in received]
        if self._carries and received:
            assert self.context is not None  # that is what carrying means
            saved, received = unpacked(received)
            self.context.update(saved)
        return received

    def _called(self, received: Sequence[torch.Tensor], arguments: Mapping[str, Any]) -> Any:
        args, kwargs = self._inputs(received, arguments)
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
            attached: list[torch.Tensor] | None = None if self.tape is None else []
            saved = packed(self.context or {}, attached).to(self.stage.device)
            tensors += [*(attached or ()), saved]
        check(tensors)
        if self.tape is not None:
            self.tape.sent = [tensor for tensor in tensors if _differentiable(tensor)]
        return tensors

    def _merged(self, outputs: list[Any]) -> Any:
        return outputs[0] if len(outputs) == 1 else merge_chunks(outputs, self._merge)


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


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
