"""What looking costs: a forward with captures against the same forward with plain torch hooks.

    python tests/benchmarks/retrieval.py --ranks 2 --pairs 40

The shipped model is loaded with tensor parallelism. In turn, within one run of this script, every
rank times forwards with (a) no hooks, (b) a plain torch hook per site that keeps a reference, and
(c) flexmagic's captures of the same sites. Printed are medians of paired ratios, the time of the
survey against one forward of its size, and how many collectives each kind of forward called.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from flexmagic import Session

MODEL = Path(__file__).parents[2] / "demo_notebooks" / "model"


def on_rank(  # noqa: C901 - it travels to the engines whole
    sites: list[str], pairs: int, batch: int, seq: int
) -> dict[str, object]:
    """Time the three kinds of forward in turn on one rank; all ranks run this at the same time."""
    import time

    import torch
    import torch.distributed as dist

    from flexmagic.engine import slot
    from flexmagic.engine.captures import Captures
    from flexmagic.engine.exchange import Exchange
    from flexmagic.engine.instrument import Instrument
    from flexmagic.engine.tree import modules_of
    from flexmagic.layout.sites import Site

    runtime = slot.Slot.runtime
    model, modules = runtime.model, modules_of(runtime.model)
    wanted = frozenset(Site.parse(site) for site in sites)
    ids = torch.randint(0, 1000, (batch, seq), generator=torch.Generator().manual_seed(0))
    exchange = Exchange(runtime.groups.own, runtime.place.rank)
    counted: list[str] = []

    def forward() -> float:
        dist.barrier()
        started = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return time.perf_counter() - started

    def plain() -> float:
        kept: list[object] = []
        paths = {site.path for site in wanted}
        handles = [
            modules[path].register_forward_hook(lambda _m, _a, out: kept.append(out)) for path in paths
        ]
        try:
            return forward()
        finally:
            for handle in handles:
                handle.remove()

    def captured() -> float:
        captures = Captures()
        instrument = Instrument(
            model, runtime.rules, exchange, captures,
            run=("benchmark", 0), seed=0, hooks=[], capture=wanted,
        )  # fmt: skip
        with instrument:
            return forward()

    def counting(kind):
        names = (
            "all_reduce",
            "all_gather",
            "all_gather_into_tensor",
            "reduce_scatter_tensor",
            "isend",
            "irecv",
        )
        before = {name: getattr(dist, name) for name in names}
        counted.clear()
        try:
            for name, function in before.items():
                setattr(
                    dist, name, lambda *a, _f=function, _n=name, **k: (counted.append(_n), _f(*a, **k))[1]
                )
            kind()
        finally:
            for name, function in before.items():
                setattr(dist, name, function)
        return len(counted)

    kinds = {"none": forward, "plain": plain, "captured": captured}
    for kind in kinds.values():
        kind()
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(pairs):
        order = list(kinds) if turn % 2 == 0 else list(reversed(kinds))
        for name in order:
            times[name].append(kinds[name]())
    survey = []
    for _ in range(3):
        dist.barrier()
        started = time.perf_counter()
        runtime.survey(None)
        survey.append(time.perf_counter() - started)
    return {"times": times, "collectives": {n: counting(k) for n, k in kinds.items()}, "survey": min(survey)}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    options = parser.parse_args()
    with Session.start(options.ranks, oversubscribe=True) as session:
        model = session.load(MODEL, tp=options.ranks)
        sites = [
            str(site) for site, rule in model.rules.items()
            if site.port == "output" and not site.leaf and not rule.refused
        ]  # fmt: skip
        views = [session._cluster.client[engine] for engine in session._calls.ranks.engines]
        pending = [v.apply_async(on_rank, sites, options.pairs, options.batch, options.seq) for v in views]
        results = [answer.get() for answer in pending]
    print(f"{len(sites)} sites, batch {options.batch} × {options.seq} tokens, {options.ranks} ranks")
    for rank, result in enumerate(results):
        times = result["times"]
        for name, against in (("plain", "none"), ("captured", "none"), ("captured", "plain")):
            ratios = [a / b for a, b in zip(times[name], times[against], strict=True)]
            print(f"rank {rank}: {name} / {against}: {statistics.median(ratios):.3f}")
        print(f"rank {rank}: collectives in a forward: {result['collectives']}")
        forward = statistics.median(times["none"])
        print(f"rank {rank}: survey {result['survey']:.2f} s, a forward of the size above {forward:.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
