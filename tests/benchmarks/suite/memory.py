"""Row (h): peak memory of notebook, controller and engines in each kind of work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from suite import on_ranks
from suite.forward import BATCH, LAYERS, SEQ, WIDTH, sites
from suite.models import llama, views_of
from suite.on_ranks import Work
from suite.pairs import Spread
from suite.report import Report, Row
from suite.transfer import WIDTH as COLUMNS
from suite.transfer import _controllers, activation, forget, place

EVERY = 0.01
TITLE = "Peak memory in MB, above what the processes had before"
GROUPS = ("notebook", "controller", "engines")


class Peaks(threading.Thread):
    """The peaks of groups of processes' own memory, above what they had at the start."""

    def __init__(self, groups: Mapping[str, Sequence[psutil.Process]]) -> None:
        super().__init__(daemon=True)
        self._groups = groups
        self._done = threading.Event()
        self._before = self._now()
        self.peaks = dict.fromkeys(groups, 0)

    def _now(self) -> dict[str, int]:
        return {name: sum(own(process.pid) for process in each) for name, each in self._groups.items()}

    def run(self) -> None:
        """Sample until :meth:`stop`."""
        while not self._done.wait(EVERY):
            self._sample()

    def _sample(self) -> None:
        for name, now in self._now().items():
            self.peaks[name] = max(self.peaks[name], now - self._before[name])

    def stop(self) -> dict[str, int]:
        """The peaks."""
        self._done.set()
        self.join()
        self._sample()
        return self.peaks


def own(pid: int) -> int:
    """Bytes of a process, of memory that it shares its share; files that it maps are not counted."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except (OSError, ValueError):  # it has ended
        return 0
    kilobytes = dict(line.split()[:2] for line in text.splitlines()[1:])
    return (int(kilobytes.get("Pss_Anon:", 0)) + int(kilobytes.get("Pss_Shmem:", 0))) << 10


def memory_rows(report: Report, folder: Path, megabytes: int = 256, times: int = 4) -> None:
    """Forwards, a grid and transfers on two engines, each way with what only it needs."""
    from flexmagic import Session

    path = llama(folder, layers=LAYERS, width=WIDTH)
    with Session.start(2, oversubscribe=True) as session:
        session.load(path, tp=2)
        for edit in (False, True):
            middle = sites()[1]
            work = Work(middle.paths, middle.width, BATCH, SEQ, times, edit)
            verb = "edit" if edit else "retrieve"
            for way in ("raw", "plain", "flexmagic", *work.rivals):
                absent = _on_all(session, on_ranks.some, work, way, 1)  # what it sets up is not counted
                peaks = _peaks(session, _forwards(session, work, way, times))
                _put(report, f"{verb} at {middle.words}, {times} forwards, TP=2", way, peaks, absent)
        over = {"layer": range(LAYERS), "position": range(20)}
        session.sweep(np.arange(20)[None], CODE, over)
        peaks = _peaks(session, lambda: session.sweep(np.arange(20)[None], CODE, over))
        _put(report, f"a grid of {LAYERS} × 20 cells, TP=2", "flexmagic", peaks)
        _transfers(report, session, megabytes, times)


def _on_all(session: Any, work: Callable[..., Any], *args: Any) -> str:
    """Have all engines do something at once; the first words with which one answers, if any does."""
    pending = [view.apply_async(work, *args) for view in views_of(session)]
    return next(filter(None, [answer.get() for answer in pending]), "")


def _forwards(session: Any, work: Work, way: str, times: int) -> Callable[[], str]:
    return lambda: _on_all(session, on_ranks.some, work, way, times)


CODE = """
model.layers[layer].input[0, position] = 0
save.p = model.output.logits[0, -1, 5]
"""
WORDS = {
    "raw": "nothing: a raw forward",
    "plain": "plain torch hooks",
    "nnsight": "NNsight 0.8.1",
    "flexmodel": "FlexModel 0.1.0",
}


def _put(report: Report, what: str, way: str, peaks: Mapping[str, int], absent: str = "") -> None:
    head = ["what", "by", *GROUPS]
    cells = [f"{peaks[group] / (1 << 20):.1f}" for group in GROUPS]
    report.put(
        TITLE, head, [what, WORDS.get(way, way), *([f"not run: {absent}", "", ""] if absent else cells)]
    )


def _transfers(report: Report, session: Any, megabytes: int, times: int) -> None:
    """Whole activations to the notebook; the controller's peak as a multiple of what one weighs."""
    rows = megabytes * (1 << 20) // (COLUMNS * 4)
    for rank, view in enumerate(views_of(session)):
        view.apply_sync(place, rank, rows, 0)
    act = activation(session, rows, 0)
    ways: dict[str, Callable[[], Any]] = {
        "flexmagic": act.numpy,
        "view.pull": lambda: np.concatenate([v.pull("piece", block=True) for v in views_of(session)], 1),
    }
    for name, way in ways.items():
        peaks = _peaks(session, lambda way=way: [way() for _ in _numbers(times)])
        _put(report, f"{times} × an activation of {megabytes} MB", name, peaks)
        value = Spread.of([peaks["controller"] / (megabytes << 20)])
        target = "<= 0.05" if name == "flexmagic" else ""
        what = f"controller's peak in {times} transfers of {megabytes} MB by {name}"
        report.add(Row("h", what, "one activation", value, target, rounds=times))
    for view in views_of(session):
        view.apply_sync(forget, 0)


def _numbers(times: int) -> Iterator[int]:
    return iter(range(times))


def _peaks(session: Any, work: Callable[[], Any]) -> dict[str, int]:
    groups = {
        "notebook": [psutil.Process(os.getpid())],
        "controller": _controllers(session),
        "engines": [psutil.Process(seat.pid) for seat in session._calls.ranks.seats],
    }
    on_ranks.trim()
    _on_all(session, on_ranks.trim)
    peaks = Peaks(groups)
    peaks.start()
    try:
        work()
    finally:
        found = peaks.stop()
    return found
