"""Rows (c) and (f): how long a notebook waits, for small things and for the first activation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from suite.pairs import in_turn, ratio
from suite.report import Report, Row

MODEL = Path(__file__).parents[3] / "demo_notebooks" / "model"
PROMPT = "When Mary and John went to the store, John gave a drink to"


def latency_rows(report: Report, rounds: int) -> None:
    """Row (c): small things, as times of ``%%px pass`` on the same two engines."""
    from flexmagic import Session

    with Session.start(2, oversubscribe=True) as session:
        session.load(MODEL, tp=2)
        view = session._cluster.client[:]
        run = session.run(PROMPT, capture=["model.layers.3.mlp"])
        act = run["model.layers.3.mlp"]
        numbers = iter(range(10**6))

        def passed() -> None:
            view.execute("pass", silent=False, block=True)

        def looked() -> None:
            act[0, -1]

        def replaced() -> None:
            session.hook("model.layers.2.mlp", f"x *= 1 + {next(numbers)} * 1e-9", name="small")

        def ran() -> None:
            session.run(PROMPT)

        ways = {"%%px pass": passed, "look": looked, "hook": replaced, "run": ran}
        times = in_turn(ways, rounds)
    report.keep_times("c", times)
    words = {
        "look": "a look at one position",
        "hook": "a hook replaced",
        "run": "a run of the shipped model with one edit",
    }
    for name, what in words.items():
        report.add(Row("c", what, "%%px pass", ratio(times, name, "%%px pass"), rounds=rounds))


def start_rows(report: Report, rounds: int) -> None:
    """Row (f): from nothing to the first whole activation, beside the same by hand.

    What ends the clusters again is not counted. Both find files in the page cache and code compiled.
    """
    times = in_turn({"flexmagic": _with_flexmagic, "by hand": _by_hand}, rounds, warm=False)
    report.keep_times("f", times)
    what = "start of two engines to the first activation"
    report.add(
        Row("f", what, "ipyparallel, %%px and pull", ratio(times, "flexmagic", "by hand"), rounds=rounds)
    )


def _with_flexmagic() -> float:
    from flexmagic import Session

    started = time.perf_counter()
    with Session.start(2, oversubscribe=True) as session:
        session.load(MODEL, tp=2)
        session.run(PROMPT, capture=["model.layers.3.mlp"])["model.layers.3.mlp"].numpy()
        return time.perf_counter() - started


CELL = f"""
import os, torch, torch.distributed as dist
torch.set_num_threads(1)
os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
from transformers import AutoModelForCausalLM, AutoTokenizer
dist.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained({str(MODEL)!r}, tp_plan="auto").eval()
tokenizer = AutoTokenizer.from_pretrained({str(MODEL)!r})
kept = []
handle = model.model.layers[3].mlp.register_forward_hook(lambda m, a, out: kept.append(out))
with torch.no_grad():
    model(**tokenizer({PROMPT!r}, return_tensors="pt"))
found = kept[0].numpy()
"""


def _by_hand() -> float:
    import logging
    import socket

    import ipyparallel as ipp

    started = time.perf_counter()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = ipp.Cluster(n=2, log_level=logging.CRITICAL)
    client: Any = cluster.start_and_connect_sync()
    try:
        view = client[:]
        view.scatter("rank", [0, 1], flatten=True, block=True)
        view.push({"port": port}, block=True)
        view.execute(CELL, block=True)
        client[0].pull("found", block=True)
        return time.perf_counter() - started
    finally:
        client.close()
        cluster.stop_cluster_sync()
