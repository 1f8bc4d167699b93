"""Row (h): peak memory of notebook, controller and engines while whole activations are fetched."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import psutil

from suite.models import views_of
from suite.pairs import Spread
from suite.report import Report, Row
from suite.transfer import WIDTH, _controllers, activation, place

EVERY = 0.01


class Peaks(threading.Thread):
    """The peaks of groups of processes' own memory, above what they had at the start."""

    def __init__(self, groups: Mapping[str, Sequence[psutil.Process]]) -> None:
        super().__init__(daemon=True)
        self._groups = groups
        self._done = threading.Event()
        self._before = self._now()
        self.peaks = dict.fromkeys(groups, 0)

    def _now(self) -> dict[str, int]:
        return {name: sum(map(_own, processes)) for name, processes in self._groups.items()}

    def run(self) -> None:
        """Sample until :meth:`stop`."""
        while not self._done.wait(EVERY):
            for name, now in self._now().items():
                self.peaks[name] = max(self.peaks[name], now - self._before[name])

    def stop(self) -> dict[str, int]:
        """The peaks."""
        self._done.set()
        self.join()
        return self.peaks


def _own(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def memory_rows(report: Report, megabytes: int = 256, times: int = 8) -> None:
    """Each way in a cluster of its own; peaks as multiples of what one activation weighs."""
    ways: dict[str, Callable[[Any, Any], Any]] = {
        "flexmagic": lambda _session, act: act.numpy(),
        "view.pull": lambda session, _act: np.concatenate(
            [view.pull("piece", block=True) for view in views_of(session)], 1
        ),
    }
    for name, way in ways.items():
        peaks = _measure(way, megabytes, times)
        for group, peak in peaks.items():
            value = Spread.of([peak / (megabytes << 20)])
            target = "<= 0.05" if (name, group) == ("flexmagic", "controller") else ""
            what = f"peak memory of {group}, {times} × {megabytes} MB by {name}"
            report.add(Row("h", what, "one activation", value, target, rounds=times))


def _measure(way: Callable[[Any, Any], Any], megabytes: int, times: int) -> dict[str, int]:
    from flexmagic import Session

    with Session.start(2, oversubscribe=True) as session:
        rows = megabytes * (1 << 20) // (WIDTH * 4)
        for rank, view in enumerate(views_of(session)):
            view.apply_sync(place, rank, rows, 0)
        act = activation(session, rows, 0)
        engines = [psutil.Process(seat.pid) for seat in session._calls.ranks.seats]
        groups = {
            "notebook": [psutil.Process(os.getpid())],
            "controller": _controllers(session),
            "engines": engines,
        }
        peaks = Peaks(groups)
        peaks.start()
        for _ in range(times):
            way(session, act)
        return peaks.stop()
