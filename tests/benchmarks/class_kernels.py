"""Guests in real notebook kernels: each types the cells of a student, and what it gets is compared."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

from class_work import BLOCK, TASKS, tasks
from jupyter_client.manager import KernelManager

PATIENCE = 300.0
"""Seconds within which a cell ends."""


class NotebookGuest:
    """One kernel, and the thread that runs its cells until ``over`` is set."""

    def __init__(self, folder: Path, address: str, guest: int, seed: int) -> None:
        self.guest, self._work = guest, tasks(guest, seed)
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel()
        self._client = self._manager.blocking_client()
        self._client.start_channels(iopub=False, stdin=False, hb=False)
        self._folder, self._address, self._seed = folder, address, seed
        self.errors: dict[str, int] = {}

    def join(self) -> None:
        """Wait for the kernel, and join the class in it."""
        self._client.kernel_info(reply=True, timeout=PATIENCE)
        here = str(Path(__file__).parent)
        self._type(f"import sys; sys.path.insert(0, {here!r})\nfrom class_work import Tally")
        self._type(f"tally = Tally.of({str(self._folder)!r}, {self.guest}, {self._seed})")
        self._type("%load_ext flexmagic")
        self._type(f"%flexcluster join {self._address} --as notebook{self.guest}")

    def _type(self, cell: str, **asked: str) -> dict[str, str]:
        """Run a cell; the values of expressions after it. Raises :class:`RuntimeError` if it fails."""
        reply = self._client.execute(
            cell, store_history=False, user_expressions=asked, reply=True, timeout=PATIENCE
        )["content"]
        if reply["status"] != "ok":
            raise RuntimeError(f"{reply['ename']}: {reply['evalue']}")
        return {name: found["data"]["text/plain"] for name, found in reply["user_expressions"].items()}

    def work(self, over: threading.Event) -> None:
        """Join, and type cell after cell."""
        self.join()
        n = 0
        while not over.is_set():
            task = self._work[n % TASKS]
            capture = f" --capture {task.site}" if task.captures else ""
            try:
                if n % BLOCK == 0:
                    self._type(task.cell)
                self._type(f'run = %flexrun "{task.prompt}"{capture}')
                self._type(f"tally.check(run, {n % TASKS})")
            except RuntimeError as error:
                said = str(error).partition("\n")[0]
                self.errors[said] = self.errors.get(said, 0) + 1
            n += 1

    def said(self) -> dict[str, object]:
        """What came of it."""
        found = ast.literal_eval(self._type("", said="tally.said()")["said"])
        return {**found, "refused": {**found["refused"], **self.errors}}

    def close(self) -> None:
        """End the kernel."""
        self._client.stop_channels()
        self._manager.shutdown_kernel()
        self._manager.cleanup_resources()
