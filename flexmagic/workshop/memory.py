"""What a gateway must know to be the same one when it is started again: a file that only its owner reads."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexmagic.errors import ClusterError

FORM = 1
"""Of the file."""


OTHER_KIND = (
    "The workshop that was left on this cluster is of another kind: of JupyterHub's users, or of guests with "
    "lines to join. Close it for good before you open this one: flexmagic workshop close."
)


class Memory:
    """The file of one cluster's workshop. Of tokens it has hashes; of a certificate, the private key too.

    Whoever holds it is the only gateway of that cluster; the system lets go of it when a process ends, in
    whatever way. ``door``: where the gateway listens; ``kernel``: of the notebook that holds it, which goes
    on with it when it restarts; ``facts``: tells the rest, plain values.
    """

    def __init__(self, folder: Path, cluster: str) -> None:
        self.path = folder / f"{cluster}-workshop.json"
        self._lock_path = self.path.with_suffix(".lock")
        self._writing = threading.Lock()
        self._lock: int | None = None
        self._written = ""
        self.door: dict[str, Any] = {}
        self.kernel = ""
        self.facts: Callable[[], dict[str, Any]] | None = None

    def take(self) -> dict[str, Any]:
        """Hold the file, and what a gateway before left in it; empty if there was none.

        Raises :class:`ClusterError` if another one is at work, or if the file cannot be read.
        """
        lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ClusterError(
                "A workshop is open on this cluster already, in another notebook or by `flexmagic workshop "
                "serve`. Close it there before you open another."
            ) from None
        self._lock = lock
        try:
            known: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            known = {}
        if not isinstance(known, dict) or known.get("form") != FORM:
            self.let_go()
            raise ClusterError(
                f"What the workshop of before left cannot be read. To begin a new one, delete {self.path}"
            )
        self.door, self.kernel = known.get("door", {}), known.get("kernel", "")
        return known

    def left_by(self, kernel: str) -> bool:
        """Whether an earlier process of a kernel left its workshop here."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return bool(kernel) and found.get("kernel") == kernel
        return False

    def save(self) -> None:
        """Write down what there is to know, in one step; nothing if it is the same, or held no more.

        Nor if the files went with the cluster.
        """
        with self._writing:
            if self._lock is None or self.facts is None or not self._lock_path.exists():
                return
            known = {"form": FORM, "door": self.door, "kernel": self.kernel, **self.facts()}
            text = json.dumps(known)
            if text == self._written:
                return
            new = self.path.with_suffix(".new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
            self._written = text

    def forget(self) -> None:
        """Delete the file: the workshop is over."""
        with self._writing:
            if self._lock is not None:
                self.path.unlink(missing_ok=True)
                self._lock_path.unlink(missing_ok=True)
        self.let_go()

    def let_go(self) -> None:
        """Hold the file no more; what it has stays for the next gateway."""
        with self._writing:
            lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):
                os.close(lock)
