"""How long it takes until control is back after a fault, and until the next run is right.

    python tests/benchmarks/faults.py --repeats 3

Every case of the fault suite is provoked on real engines on this machine. Printed are medians of
seconds: from the start of the run that goes wrong until its error is there, and from there until
the next run of the same model has given the same output as before, bit for bit. ``waits``: seconds
that user code on one rank is allowed while others wait, which are part of the first number.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from engines.fault_cases import CASES, GENERATION_CASES, MODELS, STAGE_CASES, Case, output

from flexmagic import Session

TWO = {
    "tp": [*CASES, *GENERATION_CASES],
    "fsdp": ["hook raises in the backward", "a collective on one rank", "endless loop on one rank"],
    "ddp": ["hook raises in the backward", "a collective on one rank"],
    "pp": STAGE_CASES,
}
FOUR = {
    kind: ["hook raises on rank 0", "a collective on one rank"] for kind in ("tp", "tp x dp", "tp x fsdp")
}


def timed(session: Session, case: Case, before: torch.Tensor) -> tuple[float, float]:
    """Seconds to control and to the next run; a wrong error or value ends the script."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        error = case.provoke(session, Path(folder))
        back = time.perf_counter()
    assert isinstance(error, case.error), error
    assert torch.equal(output(session), before)
    return back - started, time.perf_counter() - back


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'ranks':5} {'model':9} {'case':42} {'waits':>5} {'control':>8} {'next run':>8}")
    for ranks in args.ranks:
        with Session.start(ranks, oversubscribe=True) as session:
            for kind, names in (TWO if ranks == 2 else FOUR).items():
                loaded = ""
                for name in names:
                    case = (CASES | STAGE_CASES | GENERATION_CASES)[name]
                    if args.only not in name:
                        continue
                    if loaded != (wanted := case.model if case.model != "tp" else kind):
                        MODELS[wanted](session)
                        loaded, before = wanted, output(session)
                    times = [timed(session, case, before) for _ in range(args.repeats)]
                    control, again = (statistics.median(column) for column in zip(*times, strict=True))
                    waits = f"{case.alone:.0f}" if "wait for rank" in case.said else ""
                    print(
                        f"{ranks:<5} {wanted:9} {name:42} {waits:>5} {control:8.2f} {again:8.2f}", flush=True
                    )


if __name__ == "__main__":
    main()
