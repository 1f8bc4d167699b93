"""What one capture costs beside one plain torch hook, on a toy of one layer and on eighty layers."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from suite.pairs import Spread, in_turn
from suite.report import Report, Row

REPEATS = 2000
"""Modules that are called in one measurement, at least: one call is too short for the clock."""


def per_hook_rows(report: Report, rounds: int) -> None:
    """CPU seconds in one process: the forward does nothing that could hide what a hook costs."""
    owned = not dist.is_initialized()
    if owned:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for layers in (1, 80):
            _measure(report, layers, rounds)
    finally:
        if owned:
            dist.destroy_process_group()


def _measure(report: Report, layers: int, rounds: int) -> None:
    from flexmagic.engine.captures import Captures
    from flexmagic.engine.exchange import Exchange
    from flexmagic.engine.instrument import Instrument
    from flexmagic.layout.dims import Dim
    from flexmagic.layout.mesh import Mesh
    from flexmagic.layout.rule import Rule
    from flexmagic.layout.sites import Site

    model = nn.Sequential(*[nn.Identity() for _ in range(layers)]).eval()
    x = torch.zeros(1, 8)
    sites = [Site(str(n)) for n in range(layers)]
    mesh = Mesh(("tp",), (1,))
    rules = {s: Rule(s, (Dim("batch"), Dim("feature", 8)), "float32", mesh, ranks=(0,)) for s in sites}
    exchange = Exchange(dist.group.WORLD, 0)
    numbers = iter(range(10**9))

    repeats = -(-REPEATS // layers)

    def forward() -> float:
        started = time.thread_time()
        with torch.no_grad():
            for _ in range(repeats):
                model(x)
        return (time.thread_time() - started) / repeats

    def plain() -> float:
        kept: list[Any] = []
        handles = [m.register_forward_hook(lambda _m, _a, out: kept.append(out)) for m in model]
        try:
            return forward()
        finally:
            for handle in handles:
                handle.remove()

    def captured() -> float:
        captures = Captures()
        instrument = Instrument(
            model, rules, exchange, captures,
            run=("benchmark", next(numbers)), seed=0, hooks=[], capture=frozenset(sites),
        )  # fmt: skip
        with instrument:
            return forward()

    def unhooked() -> float:
        """The same model after all hooks were taken off."""
        captured()
        return forward()

    ways = {"none": forward, "plain": plain, "captured": captured, "after": unhooked}
    times = in_turn({name: functools.partial(way) for name, way in ways.items()}, max(rounds, 31))
    added = [(a - b) / layers * 1e6 for a, b in zip(times["captured"], times["plain"], strict=True)]
    what = f"capture, {layers} layer{'s' if layers > 1 else ''} of no work"
    n = len(times["none"])
    report.add(Row("a", f"{what}: added per hook", "a plain torch hook", Spread.of(added), "<= 5", "µs", n))
    after = [a / b for a, b in zip(times["after"], times["none"], strict=True)]
    report.add(
        Row(
            "a",
            f"after a run, {layers} layers: forward",
            "never hooked",
            Spread.of(after),
            "<= 1.03",
            rounds=n,
        )
    )
