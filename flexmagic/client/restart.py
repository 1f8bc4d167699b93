"""A cluster that outlives the restart of its notebook's kernel, and is offered to the kernel that comes.

The offer is a small file beside the cluster's own: its reaper ends the cluster if nobody has taken the
file away in time.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

WAITS = 120.0
"""Seconds that an offered cluster waits for the kernel that comes."""

_SUFFIX = ".offer"


@dataclass(frozen=True)
class Offer:
    """A cluster by its id, whose kernel it was, and what it holds, as words."""

    cluster: str
    kernel: str
    holds: str

    def write(self, security: Path) -> Path:
        """Leave the offer in the folder of the cluster's connection files."""
        path = security / f"{self.cluster}{_SUFFIX}"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


def offers(kernel: str, folder: Path) -> list[Offer]:
    """What is offered to a kernel, in all profiles below IPython's folder."""
    found = []
    for path in sorted(folder.glob(f"profile_*/security/*{_SUFFIX}")):
        with contextlib.suppress(OSError, ValueError, TypeError):  # taken at this moment, or not ours
            offer = Offer(**json.loads(path.read_text(encoding="utf-8")))
            if offer.kernel == kernel:
                found.append(offer)
    return found


def take(security: Path, cluster: str, kernel: str) -> bool:
    """Take a cluster that was offered to a kernel: whether it is that kernel's now."""
    path = security / f"{cluster}{_SUFFIX}"
    try:
        if Offer(**json.loads(path.read_text(encoding="utf-8"))).kernel != kernel:
            return False
        path.unlink()
    except (OSError, ValueError, TypeError):
        return False
    return True


def taken(path: Path, seconds: float = WAITS, *, every: float = 0.2) -> bool:
    """Wait for someone to take an offer; it is withdrawn if nobody did in time."""
    deadline = time.monotonic() + seconds
    while path.exists():
        if time.monotonic() >= deadline:
            path.unlink(missing_ok=True)
            return False
        time.sleep(every)
    return True
