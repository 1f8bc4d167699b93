"""A small process that outlives the notebook just long enough to end what the notebook started.

It waits for its standard input to close, which the kernel does whatever way the notebook's process
ends, and then ends the cluster's processes: those that the cluster's file names, and no others.
Run as ``python -m flexmagic.client.reaper CLUSTER_FILE``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil

from flexmagic.client.restart import taken

OFFERED = "offered in "
"""What a reaper hears, with a path, of a cluster that the next kernel may take."""

GRACE = 5.0
"""Seconds between asking a process to end and ending it."""


def start(cluster_file: str) -> subprocess.Popen[bytes]:
    """Start a reaper bound to this process; close its ``stdin`` only when the cluster should end."""
    return subprocess.Popen(  # noqa: S603 - our own module, in our own interpreter
        [sys.executable, "-m", "flexmagic.client.reaper", cluster_file],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def dismiss(reaper: subprocess.Popen[bytes]) -> None:
    """Let a reaper go without doing anything: its cluster has been stopped, or shall stay."""
    if reaper.stdin is not None:
        with contextlib.suppress(OSError):
            reaper.stdin.write(b"done")
            reaper.stdin.close()
    reaper.wait(GRACE)


def offer(reaper: subprocess.Popen[bytes], path: Path) -> None:
    """Have a reaper wait, when this process has ended, for someone to take the cluster's offer."""
    assert reaper.stdin is not None  # it was started with one
    reaper.stdin.write(f"{OFFERED}{path}".encode())
    reaper.stdin.flush()


def process_ids(cluster: dict[str, Any]) -> list[int]:
    """The process ids that a cluster's file names."""
    states = [cluster.get("controller", {}).get("state") or {}]
    for engine_set in cluster.get("engines", {}).get("sets", {}).values():
        states += engine_set.get("engines", {}).values()
    return [state["pid"] for state in states if state.get("pid", -1) > 0]


def named_in(path: Path) -> list[psutil.Process]:
    """The processes that a cluster's file names and that are there."""
    found = []
    for pid in process_ids(json.loads(path.read_text())):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def family_of(pids: Collection[int]) -> list[psutil.Process]:
    """The processes that these started, also those of one that has ended: they are in its session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) in pids:
                found.append(process)
    return found


def reap(path: Path, processes: list[psutil.Process]) -> None:
    """End processes and their children, first by asking; then remove the cluster's files."""
    family = family_of({process.pid for process in processes})
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [process, *process.children(recursive=True)]
    end(family)
    forget(path)


def forget(path: Path) -> None:
    """Remove a cluster's file, and what lies beside it under its name: keys, and whose turn it is."""
    path.unlink(missing_ok=True)
    name = path.stem.removeprefix("cluster-")
    ends = (".turn", ".wish", "-workshop.lock", "-workshop.json")
    left = [f"{name}{end}" for end in ends]
    left += [f"ipcontroller-{name}-{who}.json" for who in ("client", "engine")]
    for file in left:
        path.with_name(file).unlink(missing_ok=True)


def end(family: list[psutil.Process]) -> None:
    """End processes, first by asking."""
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, GRACE)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> None:
    """Wait for the notebook's end, then reap; a word on standard input means there is nothing to do."""
    path = Path(sys.argv[1])
    # looked up now, so that a process id that is used again later is never mistaken for ours
    processes = named_in(path)
    word = sys.stdin.buffer.read().decode()
    offered = word.startswith(OFFERED)
    if not word or (offered and not taken(Path(word.removeprefix(OFFERED)))):
        reap(path, processes)


if __name__ == "__main__":
    main()
