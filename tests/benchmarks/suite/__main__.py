"""``python -m suite`` in ``tests/benchmarks``: measure, print, and write JSON."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from suite.machine import environment
from suite.report import PARTS, Report

HERE = Path(__file__).parents[1]


def main() -> int:
    """Measure the rows asked for; 1 if a part broke off, or a target is missed and ``--strict`` is given."""
    parser = argparse.ArgumentParser(description="What flexmagic costs, as ratios against named baselines.")
    parser.add_argument("--rows", default=PARTS, help="letters of the rows to measure")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--slow-rounds", type=int, help="rounds of (e), else --rounds, and of (f), else a third of --rounds"
    )
    parser.add_argument("--megabytes", type=int, nargs="*", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--strict", action="store_true", help="fail if a target is missed")
    parser.add_argument("--dry-card", action="store_true", help="run what needs a GPU on the CPU, to try it")
    parser.add_argument("--json", type=Path, default=HERE.parents[1] / "artefacts" / "speed.json")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), os.environ.get("PYTHONPATH", "")]
    )  # for the engines

    import torch

    torch.set_num_threads(1)
    report = Report()
    for name, value in environment().items():
        print(f"{name}: {value}")
    print(f"load average: {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as made:
        for letter, measure in parts(report, Path(made), options):
            if letter in options.rows.replace("b", "a"):
                started = time.monotonic()
                try:
                    measure()
                except Exception as error:  # noqa: BLE001 - the other parts are measured all the same
                    traceback.print_exc()
                    report.fail(letter, error)
                report.took[letter] = round(report.took.get(letter, 0) + time.monotonic() - started, 1)
                report.write(options.json)
    took = ", ".join(f"({letter}) {seconds:.0f} s" for letter, seconds in report.took.items())
    print(f"Written: {options.json}. Took {took}.")
    print(report.bystanders.said())
    print(report.summary())
    missed = any(row.met is False for row in report.rows)
    return int(bool(report.failed) or (missed and options.strict))


def parts(report: Report, folder: Path, options: argparse.Namespace) -> list[tuple[str, Callable[[], None]]]:
    """What measures each row; (a) and (b) are one."""
    from suite import cuda, forward, grid, growth, hand, memory, notebook, per_hook, single, transfer

    rounds = options.rounds
    slow = options.slow_rounds or rounds
    starts = options.slow_rounds or max(rounds // 3, 1)
    sizes = tuple(options.megabytes)
    wide = {"width": 512, "only": ("nnsight invokes",)}
    return [
        ("a", lambda: per_hook.per_hook_rows(report, rounds)),
        ("a", lambda: forward.forward_rows(report, folder, rounds, ("tp",))),
        ("a", lambda: forward.forward_rows(report, folder, rounds, ("fsdp",))),
        ("a", lambda: single.single_rows(report, folder, rounds)),
        ("a", lambda: cuda.cuda_rows(report, folder, rounds, dry=options.dry_card)),
        ("c", lambda: hand.hand_rows(report, rounds)),
        ("c", lambda: notebook.latency_rows(report, rounds)),
        ("d", lambda: transfer.transfer_rows(report, rounds, sizes)),
        ("e", lambda: grid.grid_rows(report, folder, slow)),
        ("e", lambda: grid.grid_rows(report, folder, slow, **wide)),
        ("f", lambda: notebook.start_rows(report, starts)),
        ("g", lambda: growth.growth_rows(report, rounds)),
        ("h", lambda: memory.memory_rows(report, folder, times=min(rounds, 4))),
    ]


if __name__ == "__main__":
    sys.exit(main())
