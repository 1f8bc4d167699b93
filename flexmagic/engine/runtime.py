"""Everything flexmagic holds on one rank, in one object."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from flexmagic.engine.active_hook import ActiveHook
from flexmagic.engine.agreement import agree, form_of, form_of_input
from flexmagic.engine.box import Boxes
from flexmagic.engine.captures import Captures, Room, RunKey
from flexmagic.engine.code import HookSource, build
from flexmagic.engine.distributed import Loaded
from flexmagic.engine.draws import seed_model
from flexmagic.engine.exchange import Exchange, RunEnds, RunStopped
from flexmagic.engine.gradients import Gradients, own_gradients, survey_gradients
from flexmagic.engine.groups import Groups, Place
from flexmagic.engine.inputs import Prepared
from flexmagic.engine.instrument import OTHER_FAILED, Instrument
from flexmagic.engine.kept import Kept
from flexmagic.engine.lasting import Lasting
from flexmagic.engine.limits import Picks
from flexmagic.engine.loss import LossSource, loss_names, outputs_of
from flexmagic.engine.origin import Origin, versions_of
from flexmagic.engine.outcome import Outcome
from flexmagic.engine.outlet import Outlet
from flexmagic.engine.pipeline import whole_batches
from flexmagic.engine.prefix import Prefix
from flexmagic.engine.prints import Displays, Prints, Say, nowhere
from flexmagic.engine.private import come_to_rest
from flexmagic.engine.progress import Tell
from flexmagic.engine.rows import copies_of_a_row, extent_of, share
from flexmagic.engine.shortcuts import Short, forms_kept, shortened
from flexmagic.engine.spent import Spent
from flexmagic.engine.stage_standing import check_standings, settled, stage_mates, standing
from flexmagic.engine.surveying import PROBE_SEQ, everyone, survey, together
from flexmagic.engine.tensors import detached, dtype_name, local_of
from flexmagic.engine.traced import Names
from flexmagic.engine.tracing import TraceHook, TraceSource, trace_hook, traced
from flexmagic.engine.trainable import taking_gradients
from flexmagic.engine.tree import modules_of
from flexmagic.engine.twin import probe_inputs, probe_names
from flexmagic.engine.weight_edits import WeightEdits
from flexmagic.engine.whole import Whole
from flexmagic.errors import ModelError
from flexmagic.layout.heads import Heads
from flexmagic.layout.rule import Extent, Rule
from flexmagic.layout.seen import WeightSplit
from flexmagic.layout.sites import Site

SAME_LOSS = 1e-4
"""Largest relative difference between what ranks compute as the same loss."""


@dataclass(frozen=True)
class RunPlan:
    """One run as the client asks for it: plain data, the same on every rank.

    ``owner`` is the session that asks, so that two sessions' hooks and runs never meet. ``hooks``:
    name, version, exact sites and the heads that are meant of their features, in the order in which
    they act. ``capture_at``: what is captured in some steps of a generation only. ``grad``: whether
    the forward keeps what a backward needs; ``backward``: the loss to differentiate. ``short``: what
    of the model does not run. ``trace``: an intervention that acts after the hooks.
    """

    owner: str
    number: int
    seed: int
    hooks: tuple[tuple[str, int, tuple[Site, ...], Heads | None], ...] = ()
    capture: tuple[Site, ...] = ()
    capture_at: tuple[tuple[Site, Picks], ...] = ()
    grad: bool = False
    backward: LossSource | None = None
    short: Short = field(default_factory=Short)
    trace: TraceSource | None = None

    @property
    def key(self) -> RunKey:
        """What the run's captures are kept under."""
        return self.owner, self.number


@dataclass(frozen=True)
class RunReply:
    """What one rank reports of a run.

    ``local``: shape and dtype of each captured piece. ``extent``: the whole input's.
    """

    outcome: Outcome
    local: dict[Site, tuple[tuple[int, ...], str]]
    nbytes: int
    seconds: float
    extent: Extent
    error: str = ""
    loss: float | None = None
    room: Room = field(default_factory=Room)


@dataclass
class Runtime:
    """One rank: its groups, its model with the surveyed layout rules, hooks and captures.

    ``namespace`` is the engine's own namespace, in which users define what hooks call.
    """

    groups: Groups
    namespace: dict[str, Any]
    tell: Tell = lambda *_: None
    say: Say = lambda _said: None
    displays: Displays = nowhere
    captures: Captures = field(default_factory=Captures)
    kept: Kept = field(default_factory=Kept)
    spent: Spent = field(default_factory=Spent)
    loaded: Loaded | None = None
    origin: Origin | None = None
    built: tuple[Loaded, Origin] | None = None
    versions: dict[str, int] = field(default_factory=dict)
    rules: dict[Site, Rule] = field(default_factory=dict)
    row_groups: tuple[int, ...] = ()
    gradients: Gradients | None = None
    whole: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights: tuple[WeightSplit, ...] = ()
    taken: dict[Site, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    surveyed: tuple[Any, ...] = ()
    guessable: bool = False
    mates: frozenset[int] | None = None
    forms: dict[str, Any] = field(default_factory=dict)
    lasting: defaultdict[str, Lasting] = field(default_factory=lambda: defaultdict(Lasting))
    edits: WeightEdits = field(default_factory=WeightEdits)
    prefix: Prefix | None = None
    known_names: Names | None = None
    boxes: Boxes = field(default_factory=Boxes)
    hooks: dict[tuple[str, str, int], tuple[HookSource, Callable[[dict[str, Any]], Any]]] = field(
        default_factory=dict
    )

    @functools.cached_property
    def outlet(self) -> Outlet:
        """Where notebooks on other machines get this rank's pieces."""
        return Outlet(self.groups.meeting.host)

    @property
    def place(self) -> Place:
        """The process's rank, world size and device."""
        return self.groups.place

    @property
    def model(self) -> nn.Module:
        """The model on this rank; raises :class:`ModelError` if there is none."""
        if self.loaded is None:
            msg = "No model is loaded. Type %flexmodel PATH --tp N."
            raise ModelError(msg)
        return self.loaded.model

    def adopt(self, loaded: Loaded, origin: Origin, *, keep: bool = False) -> None:
        """Take a model on every rank or on none, then survey it where its input can be guessed.

        ``keep``: the captures of earlier runs, for a model that is the same as before.
        Raises :class:`ModelError` on all ranks alike if their parts are not those of one pipeline.
        """
        standings = everyone(self.groups, standing(loaded.model))
        check_standings(standings)
        if not keep:
            self.forget_model()
        elif self.loaded is not None:
            come_to_rest(self.model)
        self.loaded = loaded = settled(loaded, standings)
        self.origin = origin
        self.mates = stage_mates(standings, self.place.rank)
        self.namespace["model"], self.namespace["tokenizer"] = loaded.model, loaded.tokenizer
        # parts of a pipeline may differ in whether they say what they take, but all must survey or none
        mine = probe_inputs(loaded.model, 1, 1) is not None
        self.guessable = all(s.guessable if s is not None else mine for s in standings)
        if self.guessable:
            self.survey(None)
        self.versions = versions_of(loaded.model)

    def forget_model(self) -> None:
        """Let go of the model, its captures and rules; the module itself is as it was, weights included."""
        if self.loaded is not None:
            self.edits.restore(self.model)
        if self.loaded is not None and self.namespace.get("model") is self.loaded.model:
            self.namespace.pop("model", None)
            self.namespace.pop("tokenizer", None)
        self.loaded = self.origin = self.gradients = None
        self.rules, self.whole, self.weights, self.taken = {}, {}, (), {}
        self.row_groups, self.surveyed = (), ()
        self.forms, self.prefix = {}, None
        self.captures.clear()

    def survey(self, inputs: dict[str, Any] | None) -> None:
        """Measure every site's layout; ``inputs``: the user's, ``None`` to make some up."""
        assert self.loaded is not None  # adopt() and the verbs come here with a model
        with forms_kept(self.model) as forms:
            found = survey(self.loaded, self.groups, inputs, self.edits.originals())
        self.forms = forms
        self.rules, self.row_groups, self.gradients = found.rules, found.groups, None
        self.captures.overwritten = found.overwritten
        self.whole = found.parameters
        self.weights, self.taken = found.weights, found.taken
        self.surveyed = self._form(inputs)

    def _form(self, arguments: Mapping[str, Any] | None) -> tuple[Any, ...]:
        """What a survey holds for: a form of the model and, where none is made up, of the input."""
        return form_of(self.model), () if self.guessable else form_of_input(arguments or {})

    def is_stale(self, prepared: Prepared) -> bool:
        """Whether any rank's model, or the kind of input, is not what was surveyed; all ranks must ask.

        Raises :class:`~flexmagic.errors.InputError` if the ranks were given different inputs.
        """
        stale = self.surveyed != self._form(prepared.arguments)
        return agree(self.groups, prepared.arguments, stale=stale)

    def survey_gradients(self, inputs: dict[str, Any] | None) -> None:
        """Measure how gradients lie; ``inputs``: the user's, ``None`` to make some up."""
        assert self.loaded is not None  # the client has a model
        groups = max(self.row_groups) + 1
        arguments = probe_inputs(self.model, max(groups, 2), PROBE_SEQ) if inputs is None else inputs
        assert arguments is not None  # the client sends its own input where none can be made up
        if groups > 1:
            arguments = copies_of_a_row(arguments, self.row_groups[self.place.rank], 2)
        with whole_batches(self.model):
            found = survey_gradients(
                self.loaded, self.groups, self.rules, self.row_groups, arguments,
                whole=self.whole, mates=self.mates,
            )  # fmt: skip
        self.gradients = found
        self.rules = self.rules | found.rules

    def define(self, source: HookSource) -> None:
        """Compile a hook and keep it beside its other versions; nothing runs yet."""
        call = self.boxes.hook(source) if source.boxed else build(source, self.namespace)
        self.hooks[source.owner, source.name, source.version] = (source, call)

    def instrument(self, plan: RunPlan, extent: Extent) -> Instrument:
        """The plan's hooks and captures, to be attached for forwards of an input like this."""
        active = [
            ActiveHook(*self.hooks[plan.owner, name, version], frozenset(sites), heads)
            for name, version, sites, heads in plan.hooks
        ]
        exchange = Exchange(self.groups.own, self.place.rank, extent, self.mates, self.groups.outboxes)
        instrument = Instrument(
            self.model, self.rules, exchange, self.captures,
            run=plan.key, seed=plan.seed, hooks=active, capture=frozenset(plan.capture),
            capture_at=dict(plan.capture_at),
            lasting=replace(self.lasting[plan.owner], training=plan.backward is not None),
        )  # fmt: skip
        instrument.prints = Prints(self.say, self.displays)
        if plan.trace is not None:
            active.append(self._trace_hook(plan.trace, instrument))
        return instrument

    def _trace_hook(self, source: TraceSource, instrument: Instrument) -> TraceHook:
        whole = self.whole_model(instrument)
        return trace_hook(
            source, whole, self.names(), self.groups, namespace=self.namespace, context=instrument.context
        )

    def names(self) -> Names:
        """What a trace finds in the model; made anew only after a survey."""
        if self.known_names is None or self.known_names.rules is not self.rules:
            self.known_names = Names(self.rules, modules_of(self.model), self.place.rank)
        return self.known_names

    def whole_model(self, instrument: Instrument) -> Whole:
        """The model as a trace sees it in a run."""
        assert self.loaded is not None  # the client has a model
        return Whole(
            self.model, self.loaded.mesh, self.groups, self.rules, self.taken, self.whole, self.weights,
            instrument.paused,
        )  # fmt: skip

    def run(self, plan: RunPlan, prepared: Prepared) -> RunReply:
        """One forward with the plan's hooks and captures."""
        groups = max(self.row_groups, default=0) + 1
        mine = self.row_groups[self.place.rank] if self.row_groups else 0
        arguments, shared_out = share(prepared.arguments, mine, groups)
        surveyed = probe_names(self.model) if self.guessable else None
        extent = extent_of(prepared.arguments, shared_out=shared_out, surveyed=surveyed)
        instrument = self.instrument(plan, extent)
        instrument.at_once = plan.backward is not None  # a loss is one of all rows
        error, loss = "", None
        started = time.perf_counter()
        assert self.loaded is not None  # the client has a model
        attached = shortened(self.loaded, instrument, self.rules, plan.short, self.forms)
        with attached, mode(grad=plan.grad), torch.random.fork_rng(self.place.generators):
            seed_model(plan.seed)
            try:
                with traced(instrument, self.model):
                    if plan.backward is None:
                        self.model(**arguments)
                    else:
                        loss = self._differentiate(plan, arguments, instrument, prepared)
            except RunEnds:
                pass
            except RunStopped as stop:
                instrument.outcome.stopped = stop.reason or OTHER_FAILED
            except Exception as problem:  # noqa: BLE001 - whatever the model raises goes to the user
                error = f"{type(problem).__name__}: {problem}"
        self.captures.remember(plan.key, detached(instrument.context))
        return self.report(plan.key, instrument, started, error, loss=loss)

    def report(
        self, key: RunKey, instrument: Instrument, started: float, error: str, *, loss: float | None = None
    ) -> RunReply:
        """Close what was captured under a key, and say how it went; ``started``: when, by the clock."""
        kept = self.captures.finish(key)
        local = {s: (tuple(c.tensor.shape), dtype_name(c.tensor.dtype)) for s, c in kept.items()}
        nbytes = sum(c.nbytes for c in kept.values())
        passed, extent = time.perf_counter() - started, instrument.exchange.extent
        return RunReply(instrument.outcome, local, nbytes, passed, extent, error, loss, self.captures.room)

    def _differentiate(
        self, plan: RunPlan, arguments: dict[str, Any], instrument: Instrument, prepared: Prepared
    ) -> float | None:
        """A forward and the backward of the plan's loss; ``None`` if the loss failed on some rank."""
        assert plan.backward is not None  # run() comes here only then
        assert self.gradients is not None  # the client has had them surveyed
        with own_gradients(self.model) as taken:
            outputs = outputs_of(self.model, arguments, self.rules, instrument.exchange, instrument.context)
            problem, loss = "", None
            try:
                ids, modules = prepared.arguments.get("input_ids"), self.lasting[plan.owner].modules
                names = loss_names(outputs.whole, ids, outputs.context, modules)
                loss = plan.backward.evaluate(self.namespace, names)
            except Exception as error:  # noqa: BLE001 - the user's code; all ranks must hear of it before any waits
                problem = plan.backward.explain(error)
            said = everyone(self.groups, (problem, None if loss is None else float(loss.detach())))
            if any(text for text, _ in said):
                instrument.outcome.loss_failures = tuple(text for text, _ in said)
                return None
            values = [value for _, value in said]
            if any(abs(value - values[0]) > SAME_LOSS * max(abs(value), abs(values[0])) for value in values):
                text = f"it differs between the ranks: {values}"
                instrument.outcome.loss_failures = (text,) * len(values)
                return None
            assert loss is not None  # no rank has a problem
            modules = self.lasting[plan.owner].modules
            with taking_gradients(modules, self.groups, self.mates) as taking:
                loss.backward()
                if outputs.back is not None:
                    taking.of_the_loss()
                    together(self.groups, outputs.back)
            if taking.wrong:
                instrument.outcome.loss_failures = (taking.wrong[0],) * len(values)
                return None
            for name, gradient in taken().items():
                site = Site(name, "grad")
                scale = self.gradients.scale if instrument.exchange.extent.shared_out else 1.0
                local = local_of(gradient).detach()
                local = instrument.at_parameter(
                    site, local * scale if site in self.gradients.reduced else local
                )
                if site in plan.capture:
                    self.captures.keep(plan.key, site, local)
        return float(loss.detach())


@contextlib.contextmanager
def mode(*, grad: bool) -> Iterator[None]:
    """With or without gradients; compiled code runs as written: hooks do not act in what was compiled."""
    with torch.set_grad_enabled(grad), torch.compiler.set_stance("force_eager"):
        yield
