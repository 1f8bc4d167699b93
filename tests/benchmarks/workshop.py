"""A class on one model: is everything right, is it fair, what does sharing forwards bring, what is left?

    python tests/benchmarks/workshop.py --guests 30 --minutes 10

Of the guests some are notebook kernels that run the cells of students (``--kernels``), the others threads
of a process without one; all reach the gateway over its socket. Each works through seeded runs of its own
again and again: hooks without code, of eight hooks one with code in a box, captures and looks. What each
gets is compared with what one process makes of it, computed before. For as many minutes as told runs share
forwards, and before and after for a fifth as long, twice, each run has a forward of its own (``--alone``).

Printed are runs per minute, Jain's index of runs done, wrong values (more than 1e-5 off), refusals, how
much each process grew, and what is left after closing. Exits with 1 if a value is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from class_kernels import NotebookGuest
from class_work import MODEL

LIMITS = "runs=1000000 requests=1000000 captured=1GB moved=1000GB seconds=120"
SAMPLE = 5.0
"""Seconds between two looks at the processes' memory."""


KINDS = {
    "engine.nanny": "",
    "ipyparallel.engine": "engines",
    "ipyparallel.controller": "controller",
    "box_start": "boxes",
}
"""What a process is, by a word of its command."""


@dataclass
class Phase:
    """A stretch of the class in which up to ``together`` runs share a forward."""

    together: int
    seconds: float
    runs: dict[str, int] = field(default_factory=dict)
    shared: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Runs per minute of all guests together."""
        return sum(self.runs.values()) * 60 / self.seconds


def in_use() -> float:
    """Bytes that this process's allocator has given out and not had back; the rest it keeps as room."""
    import ctypes

    names = [
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
        "keepcost",
    ]  # fmt: skip

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in names]

    asked = ctypes.CDLL("libc.so.6").mallinfo2
    asked.restype = Info
    info = asked()
    return float(info.uordblks + info.hblkhd)


class Memory:
    """Bytes that only one process has, by what it is, again and again; ``engines``: asks each for its own."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}
        self.engines: Callable[[], list[float]] = list

    def sample(self) -> None:
        """Look at all processes now."""
        now: dict[str, float] = {"gateway": psutil.Process().memory_full_info().uss}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                kind = next((kind for word, kind in KINDS.items() if word in command), "")
                if kind:
                    now[kind] = now.get(kind, 0.0) + process.memory_full_info().uss
        with contextlib.suppress(Exception):  # another system's allocator
            now["engines, in use"] = sum(self.engines())
        for kind, size in now.items():
            self.seen.setdefault(kind, []).append(size)

    def grew(self) -> Iterator[tuple[str, float, float]]:
        """What each kind had after a third of the time, and at the end: medians of a tenth of the samples."""
        for kind, sizes in sorted(self.seen.items()):
            few = max(1, len(sizes) // 10)
            third = len(sizes) // 3
            yield kind, statistics.median(sizes[third : third + few]), statistics.median(sizes[-few:])


@dataclass
class Left:
    """What there is of processes, shared memory and files; to be compared before and after."""

    places: tuple[Path, ...]

    def found(self) -> set[str]:
        """All of it now."""
        files = {str(f) for place in self.places for f in place.rglob("*") if not f.is_dir()}
        shared = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}  # noqa: S108, PTH208 - looked at only
        processes = {f"{p.pid} {p.name()}" for p in psutil.Process().children(recursive=True)}
        return files | shared | processes


@contextlib.contextmanager
def light(folder: Path, address: str, first: int, last: int, seed: int) -> Iterator[None]:
    """The guests without notebooks, who leave at the end of the block."""
    command = [sys.executable, str(Path(__file__).with_name("class_work.py")), "guests", str(folder), address]
    process = subprocess.Popen([*command, str(first), str(last), str(seed)], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        process.communicate(b"over\n", timeout=120)


def ran(workshop) -> dict[str, int]:
    """How many runs of each guest are done."""
    return {guest.name: guest.use.done for guest in workshop.guests}


def watch(workshop, phases: list[Phase], memory: Memory) -> None:
    """Let the class work through the phases."""
    for phase in phases:
        workshop.together = phase.together
        before, began = ran(workshop), time.monotonic()
        while (rest := began + phase.seconds - time.monotonic()) > 0:
            time.sleep(min(rest, SAMPLE))
            memory.sample()
        phase.runs = {name: done - before.get(name, 0) for name, done in ran(workshop).items()}
        phase.seconds = time.monotonic() - began
        print(f"  ... {phase.rate:.0f} runs a minute, up to {phase.together} in a forward", flush=True)


def class_of(
    args: argparse.Namespace, folder: Path, server, phases: list[Phase], memory: Memory
) -> list[dict]:
    """Have all guests come, work and go; what came of each one's work."""
    address = server.lines[""].split()[-1]
    notebooks = [NotebookGuest(folder, address, n, args.seed) for n in range(args.kernels)]
    over = threading.Event()
    threads = [threading.Thread(target=one.work, args=(over,)) for one in notebooks]
    with light(folder, address, args.kernels, args.guests, args.seed):
        for thread in threads:
            thread.start()
        until(lambda: sum(done > 0 for done in ran(server.workshop).values()) == args.guests)
        watch(server.workshop, phases, memory)
        over.set()
    for thread in threads:
        thread.join()
    found = [one.said() for one in notebooks]
    for one in notebooks:
        one.close()
    return found + list(json.loads((folder / "light.json").read_text()).values())


def until(holds: Callable[[], bool], seconds: float = 180.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("the class did not begin to work")
        time.sleep(0.1)


def phases_of(args: argparse.Namespace) -> list[Phase]:
    """Sharing in three parts, and none twice in between."""
    shared, alone = args.minutes * 20, args.alone * 30
    if not alone:
        return [Phase(args.together, args.minutes * 60)]
    order = [(args.together, shared), (1, alone)] * 2 + [(args.together, shared)]
    return [Phase(together, seconds) for together, seconds in order]


def told(phases: list[Phase], found: list[dict], memory: Memory, left: set[str]) -> int:
    """Print the table; the exit status."""
    from flexmagic.workshop.rota import jain

    rates = {}
    print(f"{'together':>8} {'minutes':>8} {'runs':>7} {'runs/min':>9} {'jain':>6} {'least':>6} {'most':>6}")
    for together in sorted({phase.together for phase in phases}):
        some = [phase for phase in phases if phase.together == together]
        runs = {name: sum(phase.runs[name] for phase in some) for name in some[0].runs}
        seconds = sum(phase.seconds for phase in some)
        rates[together] = sum(runs.values()) * 60 / seconds
        print(
            f"{together:8} {seconds / 60:8.1f} {sum(runs.values()):7} {rates[together]:9.0f} "
            f"{jain([float(n) for n in runs.values()]):6.3f} {min(runs.values()):6} {max(runs.values()):6}"
        )
    if len(rates) > 1:
        print(
            f"sharing forwards brings {rates[max(rates)] / max(rates[1], 1e-9):.2f} times the runs per minute"
        )
    wrong, looks = sum(one["wrong"] for one in found), sum(one["looks"] for one in found)
    worst = max(one["worst"] for one in found)
    print(f"{looks} values looked at, of {sum(one['right'] for one in found)} runs that were right; ", end="")
    print(f"{wrong} runs wrong; largest relative difference {worst:.1e}")
    refused: dict[str, int] = {}
    for one in found:
        for said, times in one["refused"].items():
            refused[said] = refused.get(said, 0) + times
    print(f"refused or failed: {sum(refused.values())}")
    for said, times in refused.items():
        print(f"  {times} times {said}")
    for kind, first, last in memory.grew():
        print(
            f"memory of {kind}: {first / 1e6:.1f} MB after a third, {last / 1e6:.1f} MB at the end ", end=""
        )
        print(f"({(last - first) / 1e6:+.1f} MB)")
    files = [one for one in sorted(left) if one.startswith("/")]
    print(f"left after closing: {len(left) - len(files)} processes, {len(files)} files", end="")
    print("".join(f"\n  {one}" for one in sorted(left)))
    return int(wrong > 0)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guests", type=int, default=30)
    parser.add_argument("--kernels", type=int, default=6, help="how many of them are notebook kernels")
    parser.add_argument("--minutes", type=float, default=10.0, help="with runs that share forwards")
    parser.add_argument("--alone", type=float, help="minutes without, a fifth of the others if not given")
    parser.add_argument("--together", type=int, default=0, help="runs that may share one; 0: as usual")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.alone = args.minutes / 5 if args.alone is None else args.alone
    return args


def main() -> int:
    """Make the class; 1 if anything that a guest got is wrong."""
    args = parsed()
    memory = Memory()
    with tempfile.TemporaryDirectory() as name:
        folder, temporary = Path(name), Path(name, "temporary")
        temporary.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        left = Left((temporary,))
        before = left.found()
        script = str(Path(__file__).with_name("class_work.py"))
        subprocess.run(
            [sys.executable, script, "answers", name, str(args.guests), str(args.seed)], check=True
        )

        from flexmagic import Session
        from flexmagic.workshop.gateway import TOGETHER
        from flexmagic.workshop.opening import open_workshop

        args.together = args.together or TOGETHER
        phases = phases_of(args)
        with Session.start(2, oversubscribe=True) as session:
            session.load(MODEL, tp=2)
            view = session._cluster.client[:]
            memory.engines = lambda: view.apply_sync(in_use)
            server = open_workshop(
                session.cluster_name, guests=args.guests, limits=LIMITS, together=args.together,
                journal=folder / "log",
            )  # fmt: skip
            print(
                f"{args.guests} guests, {args.kernels} of them notebooks; 2 engines, tensor parallel",
                flush=True,
            )
            try:
                found = class_of(args, folder, server, phases, memory)
            finally:
                server.close()
        return told(phases, found, memory, left.found() - before)


if __name__ == "__main__":
    sys.exit(main())
