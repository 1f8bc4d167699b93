"""Everything flexmagic holds on one rank, in one object."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flexmagic.engine.captures import Captures, RunKey
from flexmagic.engine.code import HookSource, build
from flexmagic.engine.distributed import Loaded, local_part, split_weights
from flexmagic.engine.exchange import Exchange, RunStopped
from flexmagic.engine.groups import Groups, Place
from flexmagic.engine.inputs import Prepared
from flexmagic.engine.instrument import ActiveHook, Instrument, Outcome
from flexmagic.engine.probe import Notes, observe
from flexmagic.engine.tensors import dtype_name
from flexmagic.engine.twin import probe_inputs, twin_of
from flexmagic.errors import ModelError
from flexmagic.layout.sites import Site
from flexmagic.layout.survey import Rule, WeightSplit, infer


@dataclass(frozen=True)
class RunPlan:
    """One run as the client asks for it: plain data, the same on every rank.

    ``owner`` is the session that asks, so that two sessions' hooks and runs never meet. ``hooks``:
    name, version and exact sites, in the order in which they act.
    """

    owner: str
    number: int
    seed: int
    hooks: tuple[tuple[str, int, tuple[Site, ...]], ...] = ()
    capture: tuple[Site, ...] = ()

    @property
    def key(self) -> RunKey:
        """What the run's captures are kept under."""
        return self.owner, self.number


@dataclass(frozen=True)
class RunReply:
    """What one rank reports of a run. ``local``: shape and dtype of each captured piece."""

    outcome: Outcome
    local: dict[Site, tuple[tuple[int, ...], str]]
    nbytes: int
    seconds: float
    error: str = ""


@dataclass
class Runtime:
    """One rank: its groups, its model with the surveyed layout rules, hooks and captures.

    ``namespace`` is the engine's own namespace, in which users define what hooks call.
    """

    groups: Groups
    namespace: dict[str, Any]
    captures: Captures = field(default_factory=Captures)
    loaded: Loaded | None = None
    built: Loaded | None = None
    rules: dict[Site, Rule] = field(default_factory=dict)
    hooks: dict[tuple[str, str, int], tuple[HookSource, Callable[[dict[str, Any]], Any]]] = field(
        default_factory=dict
    )

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

    def adopt(self, loaded: Loaded) -> None:
        """Take a model on every rank or on none, then survey it where its input can be guessed."""
        self.forget_model()
        self.loaded = loaded
        self.namespace["model"], self.namespace["tokenizer"] = loaded.model, loaded.tokenizer
        first = probe_inputs(loaded.model, 2, 5)
        if first is not None:
            self.survey(first)

    def forget_model(self) -> None:
        """Let go of the model, its captures and rules; the module itself stays as it was."""
        if self.loaded is not None and self.namespace.get("model") is self.loaded.model:
            self.namespace.pop("model", None)
            self.namespace.pop("tokenizer", None)
        self.loaded = None
        self.rules.clear()
        self.captures.clear()

    def survey(self, inputs: dict[str, Any]) -> None:
        """Measure every site's layout in one forward of ``inputs``, the same on every rank."""
        assert self.loaded is not None  # adopt() and run() come here with a model
        notes = Notes()
        observe(self.model, inputs, notes)
        twin = twin_of(self.model)
        mine = (notes.seen, split_weights(self.model, twin.parameters if twin else {}), notes.overwritten())
        everyone: list[Any] = [None] * self.place.world_size
        dist.all_gather_object(everyone, mine, group=self.groups.own)
        weights = _joined([part[1] for part in everyone])
        self.rules = infer(
            self.loaded.mesh, [part[0] for part in everyone], twin.sites if twin else None, weights
        )
        self.captures.overwritten = set().union(*(part[2] for part in everyone))

    def define(self, source: HookSource) -> None:
        """Compile a hook and keep it beside its other versions; nothing runs yet."""
        self.hooks[source.owner, source.name, source.version] = (source, build(source, self.namespace))

    def run(self, plan: RunPlan, prepared: Prepared) -> RunReply:
        """One forward with the plan's hooks and captures."""
        active = [
            ActiveHook(*self.hooks[plan.owner, name, version], frozenset(sites))
            for name, version, sites in plan.hooks
        ]
        exchange = Exchange(self.groups.own, self.place.rank, self.place.world_size)
        instrument = Instrument(
            self.model, self.rules, exchange, self.captures,
            run=plan.key, seed=plan.seed, hooks=active, capture=frozenset(plan.capture),
        )  # fmt: skip
        error = ""
        started = time.perf_counter()
        with instrument, torch.no_grad(), torch.random.fork_rng(self.place.generators):
            torch.manual_seed(plan.seed)
            try:
                self.model(**prepared.arguments)
            except RunStopped as stop:
                instrument.outcome.stopped = stop.reason or "another rank's hook failed"
            except Exception as problem:  # noqa: BLE001 - whatever the model raises goes to the user
                error = f"{type(problem).__name__}: {problem}"
        self.captures.remember(plan.key, instrument.context)
        kept = self.captures.finish(plan.key)
        local = {s: (tuple(c.tensor.shape), dtype_name(c.tensor.dtype)) for s, c in kept.items()}
        nbytes = sum(c.nbytes for c in kept.values())
        return RunReply(instrument.outcome, local, nbytes, time.perf_counter() - started, error)

    def memory(self) -> tuple[int, str]:
        """Bytes in use on this rank's device and what is counted."""
        if self.place.device.type == "cuda":
            return torch.cuda.memory_allocated(self.place.device), "allocated on the device"
        with open("/proc/self/statm") as statm:  # noqa: PTH123 - a kernel file, read at once
            pages = [int(n) for n in statm.read().split()]
        return (pages[1] - pages[2]) * resource.getpagesize(), "private memory of the process"

    def parameter_bytes(self) -> int:
        """Bytes of this rank's own part of the parameters."""
        if self.loaded is None:
            return 0
        return sum(local_part(p).nbytes for p in self.loaded.model.parameters())

    def process(self) -> int:
        """The process id."""
        return os.getpid()


def _joined(per_rank: list[list[Any]]) -> list[WeightSplit]:
    """Each split weight once, with every rank's length along the split dim."""
    if len({len(weights) for weights in per_rank}) > 1:
        msg = "the ranks' models hold differently split weights"
        raise ModelError(msg)
    return [
        WeightSplit(
            parts[0].module, parts[0].dim, tuple(p.size for p in parts), all(p.in_order for p in parts)
        )
        for parts in zip(*per_rank, strict=True)
    ]
