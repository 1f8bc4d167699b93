"""What guests did, as JSON lines: who, when, which hooks, how long, and how it ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Journal:
    """A file that only its owner can read, one line for each thing that happened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(
            os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8"
        )

    def note(self, who: str, what: str, **facts: Any) -> None:
        """Write a line: ``who``, ``when`` (seconds since 1970), ``what`` and the facts, plain values."""
        line = json.dumps({"who": who, "when": round(time.time(), 3), "what": what, **facts})
        with self._lock:
            if not self._file.closed:
                with contextlib.suppress(OSError):  # a disk that is full is no reason to end the workshop
                    self._file.write(line + "\n")
                    self._file.flush()

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            self._file.close()


def digest(texts: Iterable[str]) -> str:
    """A short hash that is the same for the same hooks; empty for none."""
    known = "\n".join(texts)
    return hashlib.sha256(known.encode()).hexdigest()[:16] if known else ""
