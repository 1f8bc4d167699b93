"""A user's cell on every rank: ordinary code, in whose forwards of the model hooks and captures act."""

from __future__ import annotations

import ast
import contextlib
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flexmagic.engine.agreement import agree, numbers_of_all
from flexmagic.engine.code import HookSource, failure, shifted
from flexmagic.engine.draws import seed_model
from flexmagic.engine.exchange import RunStopped
from flexmagic.engine.generation import Step
from flexmagic.engine.instrument import OTHER_FAILED, Instrument
from flexmagic.engine.kv_cache import tokens_in
from flexmagic.engine.pipeline import Pipeline
from flexmagic.engine.prints import Prints
from flexmagic.engine.runtime import RunPlan, Runtime, mode
from flexmagic.engine.screen import Bundle, Screen
from flexmagic.engine.shortcuts import check_stages
from flexmagic.engine.stage_whole import whole_of
from flexmagic.engine.tensors import as_bytes, leaves, local_of, replace_leaf
from flexmagic.engine.tree import modules_of
from flexmagic.errors import CellError
from flexmagic.layout.rule import Extent

MADE_BY_US = ("model", "tokenizer")
"""Names of the engine's namespace that a cell may not change for good."""


class Shown(str):
    """What a value looks like that cannot travel."""

    __slots__ = ()

    def __repr__(self) -> str:
        """The text itself."""
        return str(self)


@dataclass(frozen=True)
class CellAnswer:
    """What one rank did: its forwards, what it printed and displayed, and its last value, packed."""

    steps: list[Step]
    printed: str
    value: bytes
    digest: int
    failed: str = ""
    shown: dict[int, Bundle] = field(default_factory=dict)


def run_cell(runtime: Runtime, plan: RunPlan, source: HookSource) -> CellAnswer:
    """Run a cell in the engine's namespace under the plan's hooks and captures.

    Raises :class:`CellError` for what the cell raises. Over pipeline stages :class:`ModelError`, if it is
    to be with gradients: those of a cell's own backward would stay on the last stage.
    """
    assert runtime.loaded is not None  # the client has a model
    if plan.grad:
        check_stages(
            runtime.loaded, "In a cell no gradients cross pipeline stages; in a run with a loss they do"
        )
    instrument = runtime.instrument(plan, Extent(shared_out=False))
    instrument.at_once = True
    instrument.prints = Prints(displays=runtime.displays)  # what the cell itself prints is told meanwhile
    steps = _Steps(runtime, plan, instrument)
    printed, value, stopped = Screen(), None, ""
    kept = {name: runtime.namespace[name] for name in MADE_BY_US if name in runtime.namespace}
    draws = torch.random.fork_rng(runtime.place.generators)
    try:
        with instrument, _watched(runtime, steps), mode(grad=plan.grad), draws:
            seed_model(plan.seed)
            with Prints(runtime.say, runtime.displays).taken(printed):
                value = _evaluated(source, runtime.namespace)
    except RunStopped as stop:
        stopped = stop.reason or OTHER_FAILED
    except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything; it becomes data
        if not instrument.outcome.failures:
            where = failure(runtime.place.rank, error, source.filename, source=source)
            error.__traceback__ = None
            raise CellError("the cell failed", (where,)) from None
    finally:
        steps.close()
        runtime.namespace.update(kept)
    runtime.captures.remember(plan.key, instrument.context)
    value, digest = _packed(value, source, runtime.place.rank)
    return CellAnswer(steps.done, printed.getvalue(), value, digest, stopped, printed.shown)


def _evaluated(source: HookSource, namespace: dict[str, Any]) -> Any:
    """Run a cell; the value of its last expression, ``None`` without one or with a semicolon behind it."""
    parsed = ast.parse(shifted(source), source.filename)
    last = None
    if parsed.body and isinstance(parsed.body[-1], ast.Expr) and not source.text.rstrip().endswith(";"):
        last = ast.Expression(parsed.body.pop().value)  # type: ignore[attr-defined]  # the line above checked
    exec(compile(parsed, source.filename, "exec"), namespace)  # noqa: S102 - running the user's code is the product
    return None if last is None else eval(compile(last, source.filename, "eval"), namespace)  # noqa: S307


class _Steps:
    """The forwards of the whole model that a cell makes, each with captures and a report of its own."""

    def __init__(self, runtime: Runtime, plan: RunPlan, instrument: Instrument) -> None:
        self._runtime, self._plan, self._instrument = runtime, plan, instrument
        self._ids: list[list[int]] = []
        self._started = 0.0
        self._running = False
        self.done: list[Step] = []

    def begin(self, _module: nn.Module, args: Any, arguments: dict[str, Any]) -> None:
        """Before a forward; raises :class:`InputError` on all ranks alike if they gave it other inputs."""
        found = {where: tensor for value in (args, arguments) for where, tensor in leaves(value)}
        agree(self._runtime.groups, found, stale=False)
        ids = next((t for t in found.values() if t.ndim == 2 and not t.is_floating_point()), None)
        shown = ids if ids is not None else next((t for t in found.values() if t.ndim), None)
        rows = None if shown is None else shown.shape[0]
        seq = shown.shape[1] if shown is not None and shown.ndim > 1 else None
        self._ids = ids.tolist() if ids is not None else []
        self._started, self._running = time.perf_counter(), True
        extent = Extent(rows, seq, shared_out=False, past=tokens_in(arguments))
        self._instrument.begin_step(len(self.done), extent)

    def end(self, *_: Any) -> None:
        """After a forward: go on only if all ranks are well; raises :class:`RunStopped` on all alike."""
        outcome = self._instrument.outcome
        well = not outcome.failures and not outcome.stopped
        self.close()
        if self._instrument.hooks and not all(
            ok for (ok,) in numbers_of_all(self._runtime.groups, [int(well)])
        ):
            raise RunStopped

    def close(self) -> None:
        """Keep a forward's report, also of one that did not end."""
        if self._running:
            self._running = False
            key = (*self._plan.key, len(self.done))
            self.done.append(Step(self._ids, self._runtime.report(key, self._instrument, self._started, "")))


@contextlib.contextmanager
def _watched(runtime: Runtime, steps: _Steps) -> Iterator[None]:
    """Each forward of the whole model is a step; over pipeline stages the cell's model makes those of all."""
    if isinstance(runtime.model, Pipeline):
        runtime.namespace["model"] = whole_of(
            runtime.model, lambda arguments: steps.begin(runtime.model, (), arguments), steps.end
        )
        yield
        return
    root = modules_of(runtime.model)[""]
    handles = (
        root.register_forward_pre_hook(steps.begin, prepend=True, with_kwargs=True),
        root.register_forward_hook(steps.end),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _packed(value: Any, source: HookSource, rank: int) -> tuple[bytes, int]:
    """A value as it travels, its tensors on the CPU, or as its text; and a number equal for equal values.

    Raises :class:`CellError` for a DTensor of which this rank has a piece: whose that is, nothing would say.
    """
    digest = 0
    for where, tensor in list(leaves(value)):
        if isinstance(tensor, DTensor) and not all(p.is_replicate() for p in tensor.placements):
            text = "the value is a DTensor in pieces: end the cell with .full_tensor() or .to_local()"
            raise CellError(
                "the cell failed", (failure(rank, TypeError(text), source.filename, source=source),)
            )
        own = local_of(tensor).detach().cpu().contiguous()
        value = replace_leaf(value, where, own)
        digest = zlib.crc32(f"{where}{own.dtype}{tuple(own.shape)}".encode(), digest)
        digest = zlib.crc32(as_bytes(own).numpy().data, digest)
    if isinstance(value, nn.Module):
        value = Shown(repr(value))
    try:
        raw: bytes = cloudpickle.dumps(value)
    except Exception:  # noqa: BLE001 - any class may define any __reduce__
        raw = cloudpickle.dumps(Shown(repr(value)))
    rest = value
    for where, _ in list(leaves(value)):  # a tensor's pickle also says where it is stored
        rest = replace_leaf(rest, where, None)
    return raw, zlib.crc32(raw if rest is value else cloudpickle.dumps(rest), digest)
