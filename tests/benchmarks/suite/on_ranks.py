"""What every rank runs at the same time: one model, one batch, one forward in several ways in turn.

The ways that retrieve give, and those that edit halve, the same values at the same sites; each first
proves its effect against the plain hooks before anything is timed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from suite.pairs import Times, in_turn


@dataclass(frozen=True)
class Work:
    """``paths`` of modules, the whole ``widths`` of their outputs, and the batch.

    ``edit``: whether the values are halved, else they are kept. ``rivals``: which to try.
    """

    paths: tuple[str, ...]
    width: int
    batch: int
    seq: int
    rounds: int
    edit: bool
    rivals: tuple[str, ...] = ("nnsight", "flexmodel")


@dataclass(frozen=True)
class Found:
    """Seconds per way, and what could not be run, with the reason."""

    times: Times
    absent: dict[str, str]


def forward_rows(work: Work) -> Found:
    """Run all ways in turn on this rank."""
    from flexmagic.engine.slot import Slot

    bench = _Bench(Slot.runtime, work)
    ways = {"raw forward": bench.raw, "plain hooks": bench.plain, "flexmagic": bench.flexmagic}
    absent: dict[str, str] = {}
    truth = bench.plain_output()
    for name in work.rivals:
        try:
            way = getattr(bench, name)()
            with contextlib.redirect_stdout(io.StringIO()):
                way()
                well = _same(bench.output, truth)
        except Exception as error:  # noqa: BLE001 - a rival that does not run is named, with its words
            text = str(error).strip().splitlines() or [""]
            absent[name] = f"{type(error).__name__}: {text[0][:150]}"
            well = None
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, (well, absent.get(name, "")))
        if all(ok for ok, _ in said):
            ways[name] = way
        elif name not in absent:
            absent[name] = next((text for _, text in said if text), "its output is not that of plain hooks")
    bench.flexmagic()
    if not _same(bench.output, truth):
        raise AssertionError("flexmagic's output is not that of plain hooks")
    with contextlib.redirect_stdout(io.StringIO()):
        return Found(in_turn(ways, work.rounds), absent)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


class _Bench:
    """The model on this rank, and the ways to run it."""

    def __init__(self, runtime: Any, work: Work) -> None:
        from flexmagic.layout.sites import Site

        self.runtime, self.work = runtime, work
        self.model = runtime.model
        self.world = dist.get_world_size()
        self.sites = frozenset(Site(path) for path in work.paths)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 1000, (work.batch, work.seq), generator=generator)
        groups = max(runtime.row_groups, default=0) + 1
        self.rows = groups
        mine = runtime.row_groups[runtime.place.rank] if runtime.row_groups else 0
        self.ids = ids.tensor_split(groups)[mine]
        self.output = torch.empty(0)
        self.numbers = 0
        logging.disable(logging.WARNING)

    def _timed(self, forward: Callable[[], Any]) -> float:
        dist.barrier()
        started = time.perf_counter()
        with torch.no_grad():
            found = forward()
        passed = time.perf_counter() - started
        self.output = getattr(found, "logits", found)
        return passed

    def _forward(self) -> Any:
        return self.model(input_ids=self.ids, use_cache=False)

    def raw(self) -> float:
        return self._timed(self._forward)

    # --- torch's own hooks: keep a reference, or halve the rank's own piece, which for a halving is enough

    def plain(self) -> float:
        kept: list[Any] = []
        handles = [
            self.model.get_submodule(path).register_forward_hook(
                (lambda _m, _a, out: out * 0.5) if self.work.edit else (lambda _m, _a, out: kept.append(out))
            )
            for path in self.work.paths
        ]
        try:
            return self._timed(self._forward)
        finally:
            for handle in handles:
                handle.remove()

    def plain_output(self) -> torch.Tensor:
        self.plain()
        return self.output

    # --- flexmagic: the run as a session asks for it, without the messages between notebook and engine

    def flexmagic(self) -> float:
        from flexmagic.engine.active_hook import ActiveHook
        from flexmagic.engine.code import HookSource, build
        from flexmagic.engine.runtime import RunPlan
        from flexmagic.layout.rule import Extent

        self.numbers += 1
        capture = () if self.work.edit else tuple(self.sites)
        plan = RunPlan("benchmark", self.numbers, 0, (), capture)
        extent = Extent(self.work.batch, self.work.seq, self.rows > 1)
        instrument = self.runtime.instrument(plan, extent)
        if self.work.edit:
            source = HookSource("half", 1, "x *= 0.5")
            call = build(source, self.runtime.namespace)
            instrument.hooks.append(ActiveHook(source, call, self.sites))

        def forward() -> Any:
            with instrument:
                return self._forward()

        passed = self._timed(forward)
        self.runtime.captures.drop(plan.key)
        if instrument.outcome.failures or instrument.outcome.stopped:
            raise AssertionError(str(instrument.outcome))
        return passed

    # --- NNsight 0.8.1: a trace of the same model, as each rank runs it under %%px

    def nnsight(self) -> Callable[[], float]:
        from nnsight import LanguageModel

        from suite import nnsight_ways

        wrapped = LanguageModel(self.model, tokenizer=self.runtime.loaded.tokenizer)
        way = nnsight_ways.edit if self.work.edit else nnsight_ways.retrieve
        return lambda: self._timed(lambda: way(wrapped, self.ids, self.work.paths))

    # --- FlexModel 0.1.0, with process_group=WORLD, which a CPU needs

    def flexmodel(self) -> Callable[[], float]:
        from flex_model.core import FlexModel, HookFunction

        tensor, data = (1, self.world) if self.rows > 1 else (self.world, 1)
        batch = self.work.batch if self.rows > 1 else None
        shape = (batch, None, None) if self.rows > 1 else (None, None, self.work.width)

        def half(_module: Any, x: torch.Tensor, _ctx: Any, _modules: Any) -> torch.Tensor:
            return x * 0.5

        def once() -> float:
            kept: dict[str, Any] = {}
            wrapped = FlexModel(
                self.model,
                kept,
                tensor_parallel_size=tensor,
                pipeline_parallel_size=1,
                data_parallel_size=data,
                process_group=dist.group.WORLD,
            )
            for path in self.work.paths:
                edit = half if self.work.edit else None
                wrapped.register_forward_hook(HookFunction(path, shape, editing_function=edit))
            try:
                return self._timed(lambda: wrapped(input_ids=self.ids, use_cache=False))
            finally:
                wrapped.restore()

        return once
