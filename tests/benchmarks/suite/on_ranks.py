"""What every rank runs at the same time: one model, one batch, one forward in several ways in turn.

The ways that retrieve give, and those that edit halve, the same values at the same sites; each first
proves its effect against the plain hooks before anything is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from suite import rivals
from suite.pairs import Times, in_turn

Way = Callable[[], float]

WHOLE = "flexmagic, whole"


@dataclass(frozen=True)
class Work:
    """``paths`` of modules, the whole ``width`` of their outputs, and the batch.

    ``edit``: whether the values are halved, else they are kept. ``rivals``: which to try.
    ``whole``: also an edit of ours that does not show that pieces may be edited. ``folder``: the model's.
    """

    paths: tuple[str, ...]
    width: int
    batch: int
    seq: int
    rounds: int
    edit: bool
    rivals: tuple[str, ...] = ("nnsight", "flexmodel")
    whole: bool = False
    folder: str = ""


@dataclass(frozen=True)
class Found:
    """Seconds per way, and what could not be run, with the reason."""

    times: Times
    absent: dict[str, str]


def forward_rows(work: Work) -> Found:
    """Run all ways in turn on this rank."""
    ways, absent = _ways(work)
    with contextlib.redirect_stdout(io.StringIO()):
        return Found(in_turn(ways, work.rounds), absent)


def some(work: Work, name: str, times: int) -> str:
    """Run one way a few times; what its absence is due to, if it cannot be run."""
    from flexmagic.engine.slot import Slot

    bench = Bench(Slot.runtime, work)
    try:
        way = getattr(rivals, name)(bench) if name in work.rivals else getattr(bench, name)
        with contextlib.redirect_stdout(io.StringIO()):
            for _ in range(times):
                way()
    except Exception as error:  # noqa: BLE001 - a rival that does not run is named, with its words
        return _words(error)
    return ""


def trim() -> None:
    """Give back what this process's memory holds but does not use, so that peaks do not hide in it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _ways(work: Work) -> tuple[dict[str, Way], dict[str, str]]:
    """All ways that do the same, and why others do not."""
    from flexmagic.engine.slot import Slot

    bench = Bench(Slot.runtime, work)
    ways: dict[str, Way] = {
        "raw forward": bench.raw, "plain hooks": bench.plain, "flexmagic": bench.flexmagic
    }  # fmt: skip
    if work.whole:
        ways[WHOLE] = bench.flexmagic_whole
    absent: dict[str, str] = {}
    bench.plain()
    truth, kept = bench.output, bench.total
    for name in work.rivals:
        well = None
        try:
            way = getattr(rivals, name)(bench)
            with contextlib.redirect_stdout(io.StringIO()):
                way()
                well = _same(bench.output, truth) and (work.edit or _near(bench.total, kept))
        except Exception as error:  # noqa: BLE001 - a rival that does not run is named, with its words
            absent[name] = _words(error)
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, (well, absent.get(name, "")))
        if all(ok for ok, _ in said):
            ways[name] = way
        elif name not in absent:
            absent[name] = next((text for _, text in said if text), "it does not give what plain hooks give")
    for name in [each for each in ways if each.startswith("flexmagic")]:
        ways[name]()
        if not _same(bench.output, truth):
            raise AssertionError(f"{name} does not give what plain hooks give")
    ways["raw again"] = bench.raw
    return ways, absent


def _words(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:150]}"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    close = 0.05 if one.dtype == torch.bfloat16 else 1e-5
    return bool((one - other).abs().max() <= close * other.abs().max())


def _near(one: float | None, other: float | None) -> bool:
    """Whether two sums of what was retrieved are the same; a rival that gathers is not asked for its sum."""
    return one is None or other is None or abs(one - other) <= 1e-3 * abs(other)


class Bench:
    """The model on this rank, and the ways to run it.

    ``output``: what the last way made, ``total``: the sum of all magnitudes that it retrieved, if it says.
    ``waits``: whether the time goes to when the device is done, not only to when the host has told it all.
    """

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
        self.device = runtime.place.device
        self.ids = ids.tensor_split(groups)[mine].to(self.device)
        self.output = torch.empty(0)
        self.total: float | None = None
        self.numbers = 0
        self.waits = True
        logging.disable(logging.WARNING)

    def timed(self, forward: Callable[[], Any]) -> float:
        """Seconds of a forward for which all ranks wait; its output is kept."""
        self.total = None
        dist.barrier()
        self._wait()
        started = time.perf_counter()
        with torch.no_grad():
            found = forward()
        self._wait()
        passed = time.perf_counter() - started
        self.output = getattr(found, "logits", found)
        return passed

    def _wait(self) -> None:
        if self.waits and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forward(self) -> Any:
        """The model's own."""
        return self.model(input_ids=self.ids, use_cache=False)

    def raw(self) -> float:
        """Nothing is looked at."""
        return self.timed(self.forward)

    def plain(self) -> float:
        """Torch's own hooks: keep a reference, or halve the rank's own piece, enough for a halving."""
        kept: list[Any] = []
        handles = [
            self.model.get_submodule(path).register_forward_hook(
                (lambda _m, _a, out: out * 0.5) if self.work.edit else (lambda _m, _a, out: kept.append(out))
            )
            for path in self.work.paths
        ]
        try:
            passed = self.timed(self.forward)
        finally:
            for handle in handles:
                handle.remove()
        self.total = sum(float(out.abs().sum()) for out in kept) if not self.numbers else None
        return passed

    def flexmagic(self, body: str = "x *= 0.5") -> float:
        """The run as a session asks for it, without the messages between notebook and engine."""
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
            source = HookSource("half", 1, body)
            call = build(source, self.runtime.namespace)
            instrument.hooks.append(ActiveHook(source, call, self.sites))

        def forward() -> Any:
            with instrument:
                return self.forward()

        passed = self.timed(forward)
        kept = self.runtime.captures.finish(plan.key)
        self.runtime.captures.drop(plan.key)
        if instrument.outcome.failures or instrument.outcome.stopped or not set(capture) <= set(kept):
            raise AssertionError(str(instrument.outcome))
        return passed

    def flexmagic_whole(self) -> float:
        """The same values by a call, of which nobody knows whether it may be done piece by piece."""
        return self.flexmagic("x.mul_(0.5)")
