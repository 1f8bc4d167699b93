"""The line that says what a cell waits for, and how far that is."""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from IPython.display import display

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.client.waiting import Waited
    from flexmagic.view.cancel import CancelButton

TICK, LOG, OFFER = 0.2, 10.0, 1.0
"""Seconds between two states of a line, also in a plain log, and after which it can be cancelled."""


def in_notebook(shell: InteractiveShell) -> bool:
    """Whether a cell of a notebook is running, whose front end can change what it shows.

    A console, or a program that runs a notebook without one, only adds to what is there.
    """
    kernel = getattr(shell, "kernel", None)
    return kernel is not None and "cellId" in (kernel.get_parent().get("metadata") or {})


def has_front_end(shell: InteractiveShell) -> bool:
    """Whether what is displayed reaches a front end: the shell is inside a kernel."""
    return hasattr(shell, "kernel")


def in_cell(shell: InteractiveShell) -> bool:
    """Whether this is the thread in which cells run, and one is running: not a widget's answer."""
    if threading.current_thread() is not threading.main_thread():
        return False
    kernel = getattr(shell, "kernel", None)
    return kernel is None or kernel.get_parent().get("header", {}).get("msg_type") == "execute_request"


class StatusLine:
    """One line that says what is being waited for, rewritten in place where that is possible.

    Once that takes longer, with a button that calls ``cancel``, where a button can work.
    """

    def __init__(
        self,
        shell: InteractiveShell,
        text: str,
        *,
        quiet: float = 0.0,
        cancel: Callable[[], None] | None = None,
    ) -> None:
        self._shell, self._cancel = shell, cancel
        self._button: CancelButton | None = None
        self._started = time.perf_counter()
        self._last = 0.0
        self._text = self._name = text
        self._handle: Any = None
        self._in_notebook = in_notebook(shell)
        self._in_terminal = not hasattr(shell, "kernel") and sys.stdout.isatty()
        self._is_log = not self._in_notebook and not self._in_terminal
        self._every = LOG if self._is_log else TICK
        self._pending = ""
        self._quiet = quiet
        self.is_over = False
        if not quiet:
            self._show(f"{text} …")

    def say(self, text: str) -> None:
        """Replace the line."""
        self._offer()
        if text != self._text:
            self._text = text
            self._show(f"{text} …")

    def now(self, text: str) -> None:
        """Replace the line, as often as :meth:`tick` does; its last state is not left out."""
        self._offer()
        self._text = self._pending = text
        passed = time.perf_counter() - self._started
        if passed > self._quiet and passed - self._last > self._every:
            self._last, self._pending = passed, ""
            self._show(f"{text} …")

    def tick(self, waited: Waited | None = None, far: str = "") -> None:
        """Show how long it has taken by now and how far it is: often, or in a plain log now and then."""
        self._offer()
        passed = time.perf_counter() - self._started
        if passed > self._quiet and passed - self._last > self._every:
            self._last = passed
            said = replace(waited, seconds=passed) if waited is not None else f"{passed:.1f} s"
            self._show(f"{self._text} … {said}{far and f': {far}'}")

    def done(self, text: str) -> None:
        """The last word: what has been reached, and in how long; nothing if nothing was said before."""
        if self.is_over:
            return
        if time.perf_counter() - self._started < self._quiet:
            return
        if self._is_log and self._pending:
            self._show(self._pending)
        self._show(f"{text} ({time.perf_counter() - self._started:.1f} s)", whole=True)
        if self._in_terminal:
            sys.stdout.write("\n")

    def close(self) -> None:
        """There is nothing to be waited for any more, so nothing to cancel."""
        self.is_over = True
        if self._button is not None:
            self._button.close()

    def _offer(self) -> None:
        """Show the button, once, when it is time."""
        if self._cancel is None or not self._in_notebook or time.perf_counter() - self._started < OFFER:
            return
        from flexmagic.view.cancel import cancel_button

        cancel, self._cancel = self._cancel, None
        self._button = cancel_button(self._shell, cancel, _shown_before(self._shell, "button"))
        if self._button is not None:
            _remember(self._shell, "button", self._button.handle)

    def _show(self, line: str, *, whole: bool = False) -> None:
        if self._in_terminal:  # of a line that is wrapped, only the last row would be replaced
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write(f"\r\x1b[2K{line if whole or len(line) <= width else f'{line[: width - 1]}…'}")
            sys.stdout.flush()
        elif self._is_log:
            print(line)
        else:
            plain = {"text/plain": line}
            if self._handle is None:
                self._handle = _shown_before(self._shell, self._name)
            if self._handle is None:
                self._handle = display(plain, raw=True, display_id=True)
                _remember(self._shell, self._name, self._handle)
            else:
                self._handle.update(plain, raw=True)


_SHOWN: ContextVar[tuple[str, dict[str, Any]]] = ContextVar("flexmagic_shown", default=("", {}))


def _cell(shell: InteractiveShell) -> str:
    """What tells the running cell from others."""
    kernel: Any = getattr(shell, "kernel", None)
    return str(kernel.get_parent().get("header", {}).get("msg_id", "")) if kernel is not None else ""


def _shown_before(shell: InteractiveShell, name: str) -> Any:
    """What this cell has shown under a name: in a loop, a call takes the place of the one before."""
    cell, shown = _SHOWN.get()
    return shown.get(name) if cell == _cell(shell) else None


def _remember(shell: InteractiveShell, name: str, handle: Any) -> None:
    cell, shown = _SHOWN.get()
    now = _cell(shell)
    _SHOWN.set((now, (shown if cell == now else {}) | {name: handle}))


_OPEN: ContextVar[StatusLine | None] = ContextVar("flexmagic_status_line", default=None)


def open_line() -> StatusLine | None:
    """The line that already says what this cell waits for; there is to be one at a time."""
    line = _OPEN.get()
    return None if line is None or line.is_over else line


@contextlib.contextmanager
def waiting(
    shell: InteractiveShell, text: str, *, quiet: float = 0.0, cancel: Callable[[], None] | None = None
) -> Iterator[StatusLine]:
    """A status line for the length of a block; an error ends the line before it is shown.

    ``quiet``: seconds in which nothing is said, for what is usually over by then. ``cancel``: ends it.
    """
    line = StatusLine(shell, text, quiet=quiet, cancel=cancel)
    before = _OPEN.get()
    _OPEN.set(line)
    try:
        yield line
    except GeneratorExit:  # a loop was left, which is no failure
        raise
    except BaseException:
        line.done(f"{text}: not done")
        raise
    finally:
        _OPEN.set(before)  # no token: a generator may end in another cell than it began
        line.close()
