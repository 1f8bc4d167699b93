"""Several traces in one forward: each has rows of its own, all of the same input, and sees no others.

Rows of a batch do not meet in a model, which the survey has measured; where they do, or where a trace
asks for what has no rows, the forward is given up and the client makes one for each trace.
"""

from __future__ import annotations

import contextlib
import functools
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flexmagic.engine.active_hook import ActiveHook
from flexmagic.engine.agreement import numbers_of_all
from flexmagic.engine.code import build_script
from flexmagic.engine.draws import draw_from, seed_model
from flexmagic.engine.exchange import RunStopped
from flexmagic.engine.inputs import Prepared
from flexmagic.engine.instrument import OTHER_FAILED, Instrument
from flexmagic.engine.micro_batches import batch_dim
from flexmagic.engine.outcome import Outcome
from flexmagic.engine.prefix import Prefix, prefix_of
from flexmagic.engine.rows import NoRows, batch_of, extent_of, rows_dim, share
from flexmagic.engine.runtime import RunPlan, RunReply, Runtime, mode
from flexmagic.engine.stage_standing import standing
from flexmagic.engine.tensors import detached, dtype_name
from flexmagic.engine.trace import Trace
from flexmagic.engine.traced import Names, Save, Traced, View
from flexmagic.engine.tracing import NAMES, TraceHook, TraceSource
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site, layer_of

PLAIN = (bool, int, float, str, type(None))
"""Arguments of a model that are the same for any number of rows."""


@dataclass(frozen=True)
class Swept:
    """``reply``: of the whole forward; ``cells``: of each trace, as if it had been alone.

    ``reused``: how many layers did not run, as no trace had touched anything before.
    """

    reply: RunReply
    cells: list[RunReply]
    reused: int = 0


@dataclass(frozen=True)
class Traces:
    """Those of one forward. ``numbers``: those of their runs; ``sweep``: what they are part of.

    ``reuse``: whether layers before the first that a trace touches may be computed once for the sweep.
    """

    sources: Sequence[TraceSource]
    numbers: Sequence[int]
    sweep: int
    reuse: bool = True


@dataclass(frozen=True)
class Rows:
    """Where the rows of traces are in a batch: each data group has some of every trace, one after the other.

    ``groups``: how many rows of one trace each group has.
    """

    count: int
    groups: tuple[int, ...]

    def parts(self, length: int, cell: int) -> list[slice]:
        """The places of one trace's rows along a dim of the whole batch's length."""
        per_row = length // (self.count * sum(self.groups))
        out, start = [], 0
        for rows in self.groups:
            size = rows * per_row
            out.append(slice(start + cell * size, start + (cell + 1) * size))
            start += size * self.count
        return out


@dataclass(frozen=True, kw_only=True)
class SweepHook(ActiveHook):
    """Traces in one run, each on its rows; all ranks compare where theirs have stopped."""

    traces: Sequence[TraceHook]
    rows: Rows
    rules: Mapping[Site, Rule]
    seed: int
    own_rows: bool = True
    passed: set[Site] = field(default_factory=set)
    waiting: dict[Site, list[int]] = field(default_factory=dict)

    def begin(self) -> None:
        """Run each trace up to the first that it waits for. Where all have passed, they share."""
        for cell, hook in enumerate(self.traces):
            if cell:
                draw_from(f"{self.seed}|None|{hook.source.name}|0")  # as it does alone
            hook.trace._passed = self.passed  # noqa: SLF001 - theirs is one and the same forward
            hook.trace.begin()
            self.begun(cell)

    def begun(self, cell: int) -> None:
        """A trace has stopped: note where it goes on, if it does."""
        site = self.traces[cell].trace.waits_for
        if site is not None:
            self.waiting.setdefault(site, []).append(cell)

    def passes(self, sites: Sequence[Site]) -> bool:
        """Whether none of them waits for one of some sites; all hear of it."""
        if any(site in self.waiting for site in sites):
            return False
        self.passed.update(sites)
        return True

    def acts_at(self, site: Site) -> bool:
        """Whether any of them waits for a site that the forward has reached; all hear of it."""
        if site in self.waiting:
            return True
        self.passed.add(site)
        return False

    def arrive(self, site: Site, x: torch.Tensor) -> torch.Tensor:
        """Let those go on that wait for a site; returns what they left there, or ``x`` itself."""
        rule = self.rules[site]
        dim = rows_dim(rule)
        out = x
        for cell in sorted(self.waiting.pop(site)):
            hook = self.traces[cell]
            places = [slice(None)] if dim is None else self.rows.parts(x.shape[dim], cell)
            index = [(slice(None),) * (dim or 0) + (place,) for place in places]
            own = torch.cat([x[at] for at in index], dim or 0) if len(index) > 1 else x[index[0]].clone()
            draw_from(f"{self.seed}|{site}|{hook.source.name}|1")  # as it does alone
            left = hook.trace.arrive(own)
            self.begun(cell)
            if left is own:
                continue
            if dim is None:
                raise NoRows(str(site))
            out = x.clone() if out is x else out
            for at, part in zip(index, left.split([p.stop - p.start for p in places], dim), strict=True):
                out[at] = part
        return out

    def follow(self, reach: Callable[[Site], None]) -> None:
        """Have it called with each site that one of them begins to wait for."""
        for hook in self.traces:
            hook.follow(reach)

    def settle(self, *, well: bool) -> None:
        """Go on only if all ranks are well and their traces wait for the same."""
        self.traces[0].settle(well=well)
        waits = zlib.crc32("|".join(str(hook.trace.waits_for) for hook in self.traces).encode())
        if len({numbers[0] for numbers in numbers_of_all(self.traces[0].groups, [waits])}) > 1:
            raise RunStopped("the traces ask for different sites")


def sweep(runtime: Runtime, plan: RunPlan, prepared: Prepared, traces: Traces) -> Swept | None:
    """One forward with all traces, the captures and values of each kept under its number.

    ``None``, on all ranks, for a pipeline, and for an input of which not every tensor has a row for each
    of the batch's.
    """
    if standing(runtime.model) is not None:
        return None
    batch, count = batch_of(prepared.arguments), len(traces.sources)
    tensors = [value for value in prepared.arguments.values() if isinstance(value, torch.Tensor)]
    others = [value for value in prepared.arguments.values() if not isinstance(value, torch.Tensor)]
    if any(not v.ndim or len(v) != batch for v in tensors) or not all(isinstance(v, PLAIN) for v in others):
        return None
    groups = max(runtime.row_groups, default=0) + 1
    mine = runtime.row_groups[runtime.place.rank] if runtime.row_groups else 0
    alone, shared_out = share(prepared.arguments, mine, groups)
    extent = extent_of(prepared.arguments, shared_out=shared_out)
    own = [len(part) for part in torch.arange(batch).tensor_split(groups)] if shared_out else [batch]
    contexts: list[dict[str, Any]] = [{} for _ in traces.sources]
    instrument = runtime.instrument(plan, replace(extent, rows=batch * count))
    hooks = _trace_hooks(runtime, instrument, traces.sources, contexts)
    instrument.hooks.append(hook := _hook(hooks, Rows(count, tuple(own)), runtime.names(), plan.seed))
    shared = _Shared(runtime, instrument, plan, traces, alone)
    reply = _forward(shared, hook)
    cells: list[RunReply] = []
    if not (reply.error or reply.outcome.failures or reply.outcome.stopped):
        cells = _taken(runtime, plan, traces.numbers, replace(reply, extent=extent))
        for number, context in zip(traces.numbers, contexts, strict=True):
            runtime.captures.remember((plan.owner, number), detached(context))
    runtime.captures.drop(plan.key)
    return Swept(reply, cells, shared.reused)


def _trace_hooks(
    runtime: Runtime,
    instrument: Instrument,
    sources: Sequence[TraceSource],
    contexts: Sequence[dict[str, Any]],
) -> list[TraceHook]:
    """The hooks of traces with the same code and the same names; what they can share is made once."""
    groups, world_size = runtime.groups, runtime.place.world_size
    names = runtime.names()
    view = View(Trace(runtime.rules, world_size), runtime.whole_model(instrument), names)
    body = build_script(sources[0].code, (*NAMES, *sources[0].given), runtime.namespace)
    out = []
    for source, context in zip(sources, contexts, strict=True):
        trace = Trace(runtime.rules, world_size)
        own = view.of(trace)
        named = dict(zip(NAMES, (Traced(own), Save(context), context, runtime.place.rank), strict=True))
        run = functools.partial(body, {**named, **source.given})
        hook = TraceHook(source.code, _by_itself, names.everywhere, trace=trace, groups=groups, run=run)
        trace.cell = hook
        out.append(hook)
    return out


def _by_itself(_names: dict[str, Any]) -> Any:
    raise AssertionError("a trace among others is called by the hook of all")


@dataclass
class _Shared:
    """One forward of several traces, which have the same rows: ``alone``, this rank's own."""

    runtime: Runtime
    instrument: Instrument
    plan: RunPlan
    traces: Traces
    alone: dict[str, Any]
    reused: int = 0

    def run(self, hook: SweepHook) -> None:
        """Run it, but for the layers before all that the traces wait for."""
        model, count = self.runtime.model, len(self.traces.sources)
        rows = {
            n: torch.cat([v] * count) if isinstance(v, torch.Tensor) else v for n, v in self.alone.items()
        }
        prefix, skipped = None, list[str]()
        if self.traces.reuse and all(_begins_later(site) for site in hook.waiting):
            prefix = self._prefix()
            skipped = prefix.untouched(list(hook.waiting))
        if prefix is None or not skipped:
            model(**rows)
            return
        self.reused = len(skipped)
        with prefix.begun(model, skipped, self.runtime.rules, count, lambda: self.instrument.idle):
            model(**rows)

    def _prefix(self) -> Prefix:
        """What the rows have in common, computed by the first forward of a sweep that asks for it."""
        runtime = self.runtime

        def plain() -> None:
            with self.instrument.paused(), torch.random.fork_rng(runtime.place.generators):
                runtime.model(**self.alone)

        key = self.plan.owner, self.traces.sweep
        runtime.prefix = prefix_of(
            runtime.model, runtime.rules, runtime.groups, plain,
            overwritten=runtime.captures.overwritten, key=key, known=runtime.prefix,
        )  # fmt: skip
        return runtime.prefix


def _begins_later(site: Site) -> bool:
    """Whether something may come before a site that need not be computed again."""
    layer = layer_of(site.path)
    return bool(layer) or (site.path == "" and site.port == "output")


def _forward(shared: _Shared, hook: SweepHook) -> RunReply:
    runtime, plan, instrument = shared.runtime, shared.plan, shared.instrument
    error, started = "", time.perf_counter()
    with instrument, mode(grad=False), torch.random.fork_rng(runtime.place.generators):
        seed_model(plan.seed)
        try:
            with _traced(instrument, hook):
                shared.run(hook)
        except RunStopped as stop:
            instrument.outcome.stopped = stop.reason or OTHER_FAILED
        except Exception as problem:  # noqa: BLE001 - whatever the model raises goes to the client
            error = f"{type(problem).__name__}: {problem}"
    return runtime.report(plan.key, instrument, started, error)


def _hook(traces: Sequence[TraceHook], rows: Rows, names: Names, seed: int) -> SweepHook:
    def call(names: dict[str, Any]) -> torch.Tensor:
        return hook.arrive(Site.parse(names["site"]), names["x"])

    first = traces[0]
    hook = SweepHook(
        first.source, call, names.everywhere,
        places=names.held, traces=traces, rows=rows, rules=names.rules, seed=seed,
    )  # fmt: skip
    return hook


@contextlib.contextmanager
def _traced(instrument: Instrument, hook: SweepHook) -> Iterator[None]:
    """All traces begin before the forward and must have come to their ends after it."""
    try:
        with instrument.contained(hook):
            hook.begin()
        hook.settle(well=not instrument.outcome.failures)
        yield
        for one in () if instrument.outcome.failures else hook.traces:
            one.trace.end()
    finally:
        for one in hook.traces:
            one.trace.close()


def _taken(runtime: Runtime, plan: RunPlan, numbers: Sequence[int], reply: RunReply) -> list[RunReply]:
    """Keep each trace's rows of what was captured under its number, as views; the report of each."""
    found: list[dict[Site, torch.Tensor]] = [{} for _ in numbers]
    for site in reply.local:
        piece, dim = runtime.captures.get(plan.key, site), batch_dim(runtime.rules[site])
        rows = 0 if dim is None or dim < 0 else piece.shape[dim] // len(numbers)
        for cell, own in enumerate(found):
            own[site] = piece if dim is None or dim < 0 else piece.narrow(dim, cell * rows, rows)
    replies = []
    for number, own in zip(numbers, found, strict=True):
        for site, piece in own.items():
            runtime.captures.keep((plan.owner, number), site, piece)
        local = {site: (tuple(piece.shape), dtype_name(piece.dtype)) for site, piece in own.items()}
        outcome = Outcome(calls=reply.outcome.calls, refused=reply.outcome.refused)
        nbytes = sum(piece.nbytes for piece in own.values())
        replies.append(RunReply(outcome, local, nbytes, reply.seconds / len(numbers), reply.extent))
    return replies
