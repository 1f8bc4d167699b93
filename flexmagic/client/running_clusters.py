"""The clusters of this machine that are running, whoever started them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def running() -> list[str]:
    """The names by which clusters of this machine can be attached to: their ids, and their profiles."""
    found = found_running()
    return sorted({*found, *map(profile_of, found.values())})


def found_running() -> dict[str, Any]:
    """The clusters that have a controller, by id."""
    import ipyparallel as ipp

    manager = ipp.ClusterManager()
    manager.load_clusters()
    return {c.cluster_id or "default": c for c in manager.clusters.values() if c.controller is not None}


def profile_of(cluster: Any) -> str:
    """The name of a cluster's profile."""
    return Path(cluster.profile_dir).name.removeprefix("profile_")
