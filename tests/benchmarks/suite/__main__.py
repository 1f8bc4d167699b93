"""``python -m suite`` in ``tests/benchmarks``: measure, print, and write JSON."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from suite.report import Report, environment

HERE = Path(__file__).parents[1]


def main() -> int:
    """Measure the rows asked for; 1 if a target is missed and ``--strict`` is given."""
    parser = argparse.ArgumentParser(description="What flexmagic costs, as ratios against named baselines.")
    parser.add_argument("--rows", default="abcdefgh", help="letters of the rows to measure")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slow-rounds", type=int, help="rounds of rows (e) and (f), which take longest")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--strict", action="store_true", help="fail if a target is missed")
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
    with tempfile.TemporaryDirectory() as made:
        for letter, measure in parts(report, Path(made), options).items():
            if letter in options.rows.replace("b", "a"):
                measure()
                report.write(options.json)
    print(f"Written: {options.json}")
    missed = [row for row in report.rows if row.met is False]
    print(f"{sum(row.met is True for row in report.rows)} targets met, {len(missed)} missed")
    return int(bool(missed) and options.strict)


def parts(report: Report, folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """What measures each row; (a) and (b) are one."""
    from suite import cuda, forward, grid, growth, hand, memory, notebook, per_hook, transfer

    rounds = options.rounds

    def forwards() -> None:
        per_hook.per_hook_rows(report, rounds)
        forward.forward_rows(report, folder, rounds)
        cuda.cuda_rows(report, folder, rounds)

    def latencies() -> None:
        hand.hand_rows(report, rounds)
        notebook.latency_rows(report, rounds)

    def grids() -> None:
        slow = options.slow_rounds or rounds
        grid.grid_rows(report, folder, slow)
        grid.grid_rows(report, folder, slow, width=512, only=("nnsight invokes",))

    return {
        "a": forwards,
        "c": latencies,
        "d": lambda: transfer.transfer_rows(report, rounds, tuple(options.megabytes)),
        "e": grids,
        "f": lambda: notebook.start_rows(report, options.slow_rounds or rounds),
        "g": lambda: growth.growth_rows(report, rounds),
        "h": lambda: memory.memory_rows(report, times=min(rounds, 8)),
    }


if __name__ == "__main__":
    sys.exit(main())
