"""A trace as one of a run's hooks: it acts at whatever site its cell waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flexmagic.engine.active_hook import ActiveHook
from flexmagic.engine.agreement import same_request
from flexmagic.engine.code import HookSource, build_script
from flexmagic.engine.exchange import RunEnds, RunStopped
from flexmagic.engine.groups import Groups
from flexmagic.engine.instrument import Instrument
from flexmagic.engine.pipeline import Pipeline, Turns
from flexmagic.engine.stage_standing import standing
from flexmagic.engine.stage_trace import Line
from flexmagic.engine.trace import Trace
from flexmagic.engine.traced import Names, Save, Traced, View
from flexmagic.engine.whole import Whole
from flexmagic.layout.sites import Site

NAMES = ("model", "save", "ctx", "rank")
"""What a trace sees besides the engine's own namespace; a function gets those of them that it takes."""


@dataclass(frozen=True)
class TraceSource:
    """A trace as it travels: the cell or function, and values for names in it."""

    code: HookSource
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TraceHook(ActiveHook):
    """A trace in one run. After each stop of its cell all ranks compare where theirs have stopped.

    ``line``: the stages of a pipeline, which tell each other what the cell waits for.
    """

    trace: Trace
    groups: Groups
    run: Callable[[], None]
    line: Line | None = None

    def acts_at(self, site: Site) -> bool:
        """Whether the cell waits for a site that the forward has reached."""
        return not self.trace.passes((site,))

    def passes(self, sites: Sequence[Site]) -> bool:
        """Whether the cell waits for none of some sites."""
        return self.trace.passes(sites)

    def follow(self, reach: Callable[[Site], None]) -> None:
        """Have it called with each site that the cell begins to wait for."""
        self.trace.reach = reach

    def settle(self, *, well: bool) -> None:
        """Go on only if all ranks are well and wait for the same; raises :class:`RunStopped` on all alike."""
        try:
            same_request(self.groups, self.trace.waiting, well=well)
        except RunStopped:
            if self.line is not None:
                self.line.over = True
            raise


def trace_hook(
    source: TraceSource,
    whole: Whole,
    names: Names,
    groups: Groups,
    *,
    namespace: dict[str, Any],
    context: dict[str, Any],
) -> TraceHook:
    """The hook of a trace for one run, whose ``context`` it saves into; ``whole``: the model it sees.

    ``names``: what is in it.
    """
    stands = standing(whole.model)
    line = None if stands is None else Line(groups, stands.line)
    trace = Trace(names.rules, groups.place.world_size, None if line is None else line.ranks)
    view = View(trace, whole, names)
    own = dict(zip(NAMES, (Traced(view), Save(context), context, groups.place.rank), strict=True))
    given = {**own, **source.given}
    body = build_script(source.code, tuple(given), namespace)

    def arrive(at: dict[str, Any]) -> torch.Tensor:
        waits_for = trace.waits_for
        if line is not None and waits_for is not None and not trace.everywhere(waits_for):
            line.tell(at["x"])
        return trace.arrive(at["x"])

    hook = TraceHook(
        source.code,
        arrive,
        names.everywhere,
        places=names.held,
        trace=trace,
        groups=groups,
        run=lambda: body(given),
        line=line,
    )
    trace.cell = hook
    return hook


@contextlib.contextmanager
def traced(instrument: Instrument, model: nn.Module) -> Iterator[None]:
    """A forward with a trace: the cell begins before it, and must have come to its end after it.

    Raises :class:`RunStopped` on all ranks alike if the cell fails before it asks for anything.
    """
    hook = _hook_of(instrument)
    if hook is None:
        yield
        return
    try:
        _go_on(instrument, hook, hook.trace.begin)
        with _in_turns(instrument, hook, model):
            try:
                yield
            except RunEnds:
                if hook.line is not None:
                    hook.line.finish()
                _contained(instrument, hook, hook.trace.end)
                raise
        _contained(instrument, hook, hook.trace.end)
    finally:
        hook.trace.close()


@contextlib.contextmanager
def _in_turns(instrument: Instrument, hook: TraceHook, model: nn.Module) -> Iterator[None]:
    """Over pipeline stages, let the cell on each of them go along with the others."""
    line = hook.line
    if line is None or not isinstance(model, Pipeline):
        yield
        return

    def arrives(x: torch.Tensor) -> None:
        with instrument.contained(hook, hook.trace.waits_for):
            hook.trace.arrive(x)
        hook.settle(well=not instrument.outcome.failures)

    def well() -> bool:
        return not instrument.outcome.failures and not instrument.outcome.stopped

    line.arrives, line.passed = arrives, hook.trace.passed
    model.turns = Turns(line.before, lambda error: line.after(error, well=well()))
    handle = model.register_forward_hook(lambda *_: line.finish())
    try:
        yield
    finally:
        model.turns = None
        handle.remove()


@contextlib.contextmanager
def traced_steps(instrument: Instrument, most: int) -> Iterator[None]:
    """A generation of so many forwards at most, with a trace; the trace must have come to its end after it.

    Each forward is to begin with :func:`step_begins` and to end with :func:`step_ends`.
    """
    hook = _hook_of(instrument)
    if hook is None:
        yield
        return
    hook.trace.steps = most
    try:
        yield
        _contained(instrument, hook, hook.trace.end)
    finally:
        hook.trace.close()


def step_begins(instrument: Instrument, step: int) -> None:
    """A generation's forward begins; raises :class:`RunStopped` as :func:`traced` does."""
    hook = _hook_of(instrument)
    if hook is not None and (step == 0 or hook.trace.begins(step)):
        _go_on(instrument, hook, hook.trace.begin)


def step_ends(instrument: Instrument) -> None:
    """A generation's forward is over; what the cell asked for in vain is among the failures."""
    hook = _hook_of(instrument)
    if hook is not None:
        _contained(instrument, hook, lambda: hook.trace.end(over=False))


def _hook_of(instrument: Instrument) -> TraceHook | None:
    return next((hook for hook in instrument.hooks if isinstance(hook, TraceHook)), None)


def _go_on(instrument: Instrument, hook: TraceHook, go: Callable[[], None]) -> None:
    with instrument.contained(hook):
        go()
    hook.settle(well=not instrument.outcome.failures)


def _contained(instrument: Instrument, hook: TraceHook, do: Callable[[], None]) -> None:
    if not instrument.outcome.failures:
        with instrument.contained(hook):
            do()
