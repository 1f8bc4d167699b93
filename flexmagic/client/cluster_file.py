"""The file that names a cluster's processes, which several notebooks and a gateway keep together.

ipyparallel writes into it what one process knows. Here a process that writes leaves in it the engines
that others have started since, and whoever reads finds a whole file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ipyparallel as ipp
import psutil

from flexmagic.client.pulse import lives


class SharedCluster(ipp.Cluster):  # type: ignore[misc]  # ipyparallel has none
    """A cluster whose engines may be replaced by any of the processes that use it."""

    def to_dict(self) -> dict[str, Any]:
        """What this process knows of the cluster, and the engines at work that others put into its file."""
        known: dict[str, Any] = super().to_dict()
        sets = known["engines"]["sets"]
        for name, engine_set in _sets_in(Path(self.cluster_file)).items():
            if _lives(engine_set) and not _lives(sets.get(name, {})):
                sets[name] = engine_set
        return known

    def write_cluster_file(self) -> None:
        """Write the file in one step, one process after the other."""
        path = Path(self.cluster_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            new = path.with_suffix(".new")
            new.write_text(json.dumps(self.to_dict()), encoding="utf-8")
            new.replace(path)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other writers out, by a lock on the folder, which leaves nothing behind."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _sets_in(path: Path) -> dict[str, Any]:
    try:
        sets: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["engines"]["sets"]
    except (OSError, ValueError, KeyError):  # no file yet, or none of a cluster
        return {}
    return sets


def _lives(engine_set: dict[str, Any]) -> bool:
    """Whether one of a set's processes is at work; of those that end, this process may hear late."""
    for state in engine_set.get("engines", {}).values():
        with contextlib.suppress(psutil.NoSuchProcess, ValueError):
            if lives(psutil.Process(state.get("pid", -1))):
                return True
    return False
