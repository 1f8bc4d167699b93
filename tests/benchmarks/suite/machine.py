"""Where it is measured, and whether anybody else was using that machine meanwhile."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

QUIET = 0.05
"""The share of the cores' time that others may use on a machine that is called quiet."""


def environment() -> dict[str, Any]:
    """The machine and the versions of what is measured."""
    versions = {}
    compared = ("nnsight", "flex-model", "pyvene", "transformer_lens")
    for name in ("torch", "transformers", "numpy", "ipyparallel", *compared):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": next(iter(names), platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GB",
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        **versions,
    }


class Bystanders:
    """What others did on this machine since this was made: their CPU time, and the load."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._load = os.getloadavg()[0]
        self._before = _others()

    def said(self) -> str:
        """A sentence that says whether the machine was quiet.

        Others are all processes that are neither ours nor our children; those that began and ended
        meanwhile show in the load only.
        """
        passed = time.monotonic() - self._started
        used = {who: spent - self._before.get(who, 0.0) for who, spent in _others().items()}
        cores = len(os.sched_getaffinity(0))
        share = sum(used.values()) / (passed * cores) if passed else 0.0
        quiet = share <= QUIET and self._load <= cores / 2
        text = f"load average {self._load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end"
        most = sorted(((spent, who[1]) for who, spent in used.items() if spent > passed / 100), reverse=True)
        names = f" ({', '.join(dict.fromkeys(name for _, name in most[:3]))})" if most else ""
        how = "The machine was quiet" if quiet else "THE MACHINE WAS LOADED"
        return f"{how}: {text}; other processes used {100 * share:.1f} % of its {cores} cores{names}."


def _others() -> dict[tuple[int, str], float]:
    """CPU seconds of all processes but this one, its parents and its children."""
    me = psutil.Process()
    ours = {me.pid, *(p.pid for p in me.children(recursive=True)), *(p.pid for p in me.parents())}
    found = {}
    for process in psutil.process_iter(["name", "cpu_times"]):
        times = process.info["cpu_times"]
        if process.pid not in ours and times is not None:
            found[process.pid, process.info["name"]] = times.user + times.system
    return found
