"""What a cell is told of work that takes long and that nobody else tells of."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flexmagic.client.pace import Pace
from flexmagic.magics.status_line import in_cell, open_line, waiting

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.client.waiting import Progress
    from flexmagic.client.wire import Arriving

WORDS = {
    "run": "Running", "run_cell": "Running", "run_sweep": "Running", "generate": "Generating",
    "load_model": "Loading the model", "build_model": "Building the model", "adopt_model": "Surveying",
    "survey_for": "Surveying", "survey_gradients": "Surveying gradients", "scan": "Finding shapes",
    "edit_weights": "Editing weights", "undo_weights": "Undoing edits", "restore_weights": "Undoing edits",
}  # fmt: skip
"""What a verb of the engines does, where "Working" would say too little."""


class Attending:
    """Shows a line, and a button that ends it, for what takes over a second in a cell."""

    def __init__(self, shell: InteractiveShell, cancel: Callable[[], None]) -> None:
        self._shell, self._cancel = shell, cancel

    @contextlib.contextmanager
    def working(self, verb: str) -> Iterator[Progress | None]:
        """For the rest of a call that has taken a second by now; nothing outside a cell's own thread.

        A call that is a part of what a line tells of already goes on in that line.
        """
        if not in_cell(self._shell):
            yield None
            return
        if (line := open_line()) is not None:
            yield line.tick
            return
        what = WORDS.get(verb, "Working")
        with waiting(self._shell, what, cancel=self._cancel) as status:
            yield status.tick
            status.done(what)

    @contextlib.contextmanager
    def gathering(self, what: str) -> Iterator[Arriving | None]:
        """For something that arrives in parts: how many bytes have come, of how many."""
        if not in_cell(self._shell):
            yield None
            return
        stopped, pace, started = threading.Event(), Pace(), time.perf_counter()

        def cancel() -> None:
            stopped.set()
            self._cancel()

        with waiting(self._shell, f"Fetching {what}", quiet=1.0, cancel=cancel) as status:

            def arriving(here: int, total: int) -> None:
                if stopped.is_set():
                    raise KeyboardInterrupt
                pace.see(time.perf_counter() - started, {0: ("", here >> 20, total >> 20)})
                status.tick(far=", ".join(filter(None, [f"{here >> 20} of {total >> 20} MiB", str(pace)])))

            yield arriving
            status.done(f"Fetched {what}")

    @contextlib.contextmanager
    def counting(self, what: str, total: int | None) -> Iterator[Callable[[int], None] | None]:
        """For a loop in a cell: the number of its passes that are done, each time one is."""
        if not in_cell(self._shell):
            yield None
            return
        stopped, pace, started, said = threading.Event(), Pace(), time.perf_counter(), what

        def cancel() -> None:
            stopped.set()
            self._cancel()

        with waiting(self._shell, what, quiet=1.0, cancel=cancel) as status:

            def counted(done: int) -> None:
                nonlocal said
                said = f"{what} {done}" + (f"/{total}" if total is not None else "")
                if total is not None:
                    pace.see(time.perf_counter() - started, {0: ("", done, total)})
                status.now(", ".join(filter(None, [said, str(pace)])))
                if stopped.is_set():
                    raise KeyboardInterrupt

            def ended(*_: Any) -> None:
                """With the cell at the latest: an error's traceback keeps the loop that it left."""
                self._shell.events.unregister("post_run_cell", ended)
                status.done(said)
                status.close()

            self._shell.events.register("post_run_cell", ended)
            try:
                yield counted
            finally:
                if not status.is_over:
                    ended()
