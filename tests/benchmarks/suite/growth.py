"""Row (g): what grows with the number of ranks, on the notebook's side, with ranks that answer from here.

The client's own code runs; only the sockets are left out. Counted are messages, their bytes, and the
notebook's CPU seconds, for the answers of one run of forty captured sites and for looks at one of them.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from suite.pairs import Spread
from suite.report import Report, Row

RANKS = (2, 8, 64, 512)
SHAPE = (1, 512, 4096)
SITES = 40
TITLE = "What the notebook's side of an operation costs, by the number of ranks"


class Far:
    """Ranks that hold columns of one tensor and answer in this process; ``world_size`` of them."""

    def __init__(self, world_size: int, whole: torch.Tensor) -> None:
        self.world_size = world_size
        self.lives = [0] * world_size
        self.unreachable: set[str] = set()
        self.messages = self.asked = self.told = 0
        self.aside = 0.0
        self._pieces = whole.chunk(world_size, -1)
        turns = SimpleNamespace(turn=contextlib.nullcontext)
        self.ranks = SimpleNamespace(cluster=SimpleNamespace(turns=turns))

    def ended(self) -> tuple[int, ...]:
        return ()

    def gone(self, _lives: Any) -> tuple[int, ...]:
        return ()

    def arriving(self, _what: str, progress: Any) -> Any:
        return contextlib.nullcontext(progress)

    def some(self, requests: dict[int, tuple[str, Any, Any]], _progress: Any = None) -> dict[int, Any]:
        from flexmagic.client.engine_side import packed

        out, sent = {}, {}
        for rank, (verb, args, kwargs) in requests.items():
            sent.setdefault(id(args), packed(args, kwargs))
            self.messages += 1
            self.asked += len(sent[id(args)])
            started = time.thread_time()
            raw = pickle.dumps(self._answer(rank, verb, *args))
            self.told += len(raw)
            self.aside += time.thread_time() - started
            out[rank] = pickle.loads(raw)  # noqa: S301 - made two lines above
        return out

    def _answer(self, rank: int, verb: str, _run: Any, _site: Any, parts: Any) -> Any:
        from flexmagic.engine import look

        if verb == "lend":
            return [None] * len(parts)
        piece = self._pieces[rank]
        return [(look.slice_bytes if verb == "read" else look.stats)(piece, part) for part in parts]


def growth_rows(report: Report, rounds: int, ranks: tuple[int, ...] = RANKS) -> None:
    """Measure at each number of ranks in turn."""
    whole = torch.rand(SHAPE)
    few, many = ranks[0], ranks[-1]
    worlds = {n: Far(n, whole) for n in ranks}
    operations: dict[str, Callable[[Far, Any], Any]] = {
        "a run with forty captured sites": _ran,
        "a look at a tile of 64 × 64": lambda _far, made: made[0][0, 100:164, 1000:1064],
        "statistics of the whole": lambda _far, made: made[0].stats(),
    }
    made = {n: (_activation(far), _answers(n)) for n, far in worlds.items()}
    for name, operation in operations.items():
        seconds: dict[int, list[float]] = {n: [] for n in ranks}
        for _ in range(rounds):
            for n, far in worlds.items():
                far.messages = far.asked = far.told = 0
                far.aside = 0.0
                started = time.thread_time()
                operation(far, made[n])
                seconds[n].append(time.thread_time() - started - far.aside)
        _tell(report, name, "messages", [far.messages for far in worlds.values()], ranks)
        _tell(report, name, "bytes of messages", [far.asked + far.told for far in worlds.values()], ranks)
        middle = [1e6 * statistics.median(taken) for taken in seconds.values()]
        _tell(report, name, "notebook's CPU time in µs", middle, ranks)
        grown = Spread.of([a / b for a, b in zip(seconds[many], seconds[few], strict=True)])
        title = f"{name}: notebook's CPU time on {many} ranks"
        report.add(Row("g", title, f"on {few} ranks", grown, f"<= {many // few}", rounds=len(seconds[few])))
    moved = [_moved(worlds[n], made[n][0]) for n in (many, few)]
    same = Spread.of([moved[0] / moved[1]])
    report.add(Row("g", f"data of a look on {many} ranks", f"on {few} ranks", same, "<= 1", rounds=1))


def _tell(report: Report, name: str, of_what: str, found: Sequence[float], ranks: tuple[int, ...]) -> None:
    """What grows, and with what power of the number of ranks."""
    power = math.log(found[-1] / found[1]) / math.log(ranks[-1] / ranks[1])
    how = "not at all" if power < 0.05 else f"as ranks^{power:.2f}"
    head = ["operation", "what", *(f"{n} ranks" for n in ranks), f"grows from {ranks[1]} to {ranks[-1]}"]
    report.put(TITLE, head, [name, of_what, *(f"{n:,.0f}" for n in found), how])


def _moved(_far: Far, act: Any) -> int:
    before = act.bytes_moved
    act[0, 100:164, 1000:1064]
    return int(act.bytes_moved - before)


def _layout(world_size: int) -> Any:
    from flexmagic.layout.layout import Layout, contiguous_spans
    from flexmagic.layout.mesh import Mesh

    spans = contiguous_spans([SHAPE[-1] // world_size] * world_size)
    blocks = tuple((((0, SHAPE[0]),), ((0, SHAPE[1]),), own) for own in spans)
    dims = ("batch", "seq", "feature")
    return Layout(SHAPE, dims, "float32", Mesh(("tp",), (world_size,)), blocks)


def _activation(far: Far) -> Any:
    from flexmagic.client.activation import Activation, Origin
    from flexmagic.layout.sites import Site

    origin = Origin(("benchmark", 1), Site("made"), (), (), (), 0, tuple(far.lives))
    return Activation(far, origin, _layout(far.world_size), dict)  # type: ignore[arg-type]


def _answers(world_size: int) -> Any:
    """Every rank's answer to a run, as it comes over the wire, and the rules of its sites."""
    from flexmagic.engine.outcome import Edit, Outcome
    from flexmagic.engine.runtime import RunReply
    from flexmagic.engine.verbs import RunAnswer
    from flexmagic.layout.dims import Dim
    from flexmagic.layout.mesh import Mesh
    from flexmagic.layout.rule import Extent, Rule, Split
    from flexmagic.layout.sites import Site

    mesh, ranks = Mesh(("tp",), (world_size,)), tuple(range(world_size))
    dims = (Dim("batch"), Dim("seq"), Dim("feature", SHAPE[-1]))
    sites = [Site(f"model.layers.{n}.mlp.up_proj") for n in range(SITES)]
    rules = {s: Rule(s, dims, "float32", mesh, ranks, (Split(2, ranks),)) for s in sites}
    local = dict.fromkeys(sites, ((*SHAPE[:2], SHAPE[2] // world_size), "float32"))
    edits = [Edit(str(sites[0]), "damp", edited=True, sums=(1, 2))]
    reply = RunReply(Outcome(edits=edits), local, 0, 0.1, Extent(SHAPE[0], SHAPE[1], shared_out=False))
    answer = RunAnswer(reply, [["a"] * SHAPE[1]], [[1] * SHAPE[1]])
    return [pickle.dumps(answer) for _ in ranks], rules, sites


def _ran(far: Far, made: Any) -> Any:
    """One run: a request to every rank, packed once, and every rank's answer, read and compared."""
    from flexmagic.client import failures
    from flexmagic.client.engine_side import packed
    from flexmagic.client.run import Run
    from flexmagic.engine.runtime import RunPlan

    raw, rules, sites = made[1]
    plan = RunPlan("benchmark", 1, 0, (("damp", 1, tuple(sites[:1]), None),), tuple(sites))
    asked = packed((plan, [list(range(SHAPE[1]))]))
    far.messages, far.asked, far.told = 2 * len(raw), len(raw) * len(asked), sum(map(len, raw))
    answers = [pickle.loads(one) for one in raw]  # noqa: S301 - ours
    failures.raise_for([answer.reply for answer in answers], rules)
    return Run(("benchmark", 1), far, answers, rules)[str(sites[3])]  # type: ignore[arg-type]
