"""What the magics of one notebook share: its session, and the ways to show and to wait."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from IPython.core.magic import Magics
from IPython.display import display

from flexmagic.errors import ClusterError, FlexError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.client.session import Session
    from flexmagic.client.waiting import Waited
    from flexmagic.view.cancel import CancelButton


TICK, OFFER = 0.2, 1.0
"""Seconds between two looks at the clock in a status line, and after which it can be cancelled."""


class Desk:
    """The one session of a notebook, and how the magics speak to the user."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        manager = shell.magics_manager
        self.magics_before = {(kind, name) for kind, magics in manager.magics.items() for name in magics}
        self.magics_before |= {("registry", name) for name in manager.registry}
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """The session; raises :class:`ClusterError` before a start."""
        if self._session is None:
            msg = "No cluster is running. Type %flexcluster start -n 2."
            raise ClusterError(msg)
        return self._session

    @property
    def has_session(self) -> bool:
        """Whether a cluster was started or attached to."""
        return self._session is not None

    def take(self, session: Session) -> None:
        """Make a session the notebook's."""
        self._session = session

    def drop(self) -> Session:
        """Give the session away; raises as :attr:`session` does."""
        session, self._session = self.session, None
        return session

    def leave(self) -> None:
        """End the session, if any, as the end of the notebook would."""
        if self._session is not None:
            with contextlib.suppress(FlexError):
                self._session.leave()
            self._session = None


class DeskMagics(Magics):
    """A family of magics at one desk."""

    def __init__(self, shell: InteractiveShell, desk: Desk) -> None:
        super().__init__(shell)
        self._desk = desk


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
        self._text = text
        self._handle: Any = None
        self._in_kernel = hasattr(shell, "kernel")
        self._in_terminal = not self._in_kernel and sys.stdout.isatty()
        self._quiet = quiet
        if not quiet:
            self._show(f"{text} …")

    def say(self, text: str) -> None:
        """Replace the line."""
        self._offer()
        if text != self._text:
            self._text = text
            self._show(f"{text} …")

    def tick(self, waited: Waited) -> None:
        """Show how long it has taken by now and how far it is, a few times a second; not in a plain log."""
        self._offer()
        passed = time.perf_counter() - self._started
        if passed > self._quiet and passed - self._last > TICK and (self._in_kernel or self._in_terminal):
            self._last = passed
            self._show(f"{self._text} … {replace(waited, seconds=passed)}")

    def done(self, text: str) -> None:
        """The last word: what has been reached, and in how long; nothing if nothing was said before."""
        if time.perf_counter() - self._started < self._quiet:
            return
        self._show(f"{text} ({time.perf_counter() - self._started:.1f} s)")
        if self._in_terminal:
            sys.stdout.write("\n")

    def close(self) -> None:
        """There is nothing to be waited for any more, so nothing to cancel."""
        if self._button is not None:
            self._button.close()

    def _offer(self) -> None:
        """Show the button, once, when it is time."""
        if self._cancel is None or time.perf_counter() - self._started < OFFER:
            return
        from flexmagic.view.cancel import cancel_button

        cancel, self._cancel = self._cancel, None
        self._button = cancel_button(self._shell, cancel)

    def _show(self, line: str) -> None:
        if self._in_terminal:
            sys.stdout.write(f"\r\x1b[2K{line}")
            sys.stdout.flush()
        elif not self._in_kernel:
            print(line)
        else:
            plain = {"text/plain": line}
            if self._handle is None:
                self._handle = display(plain, raw=True, display_id=True)
            else:
                self._handle.update(plain, raw=True)


@contextlib.contextmanager
def waiting(
    shell: InteractiveShell, text: str, *, quiet: float = 0.0, cancel: Callable[[], None] | None = None
) -> Iterator[StatusLine]:
    """A status line for the length of a block; an error ends the line before it is shown.

    ``quiet``: seconds in which nothing is said, for what is usually over by then. ``cancel``: ends it.
    """
    line = StatusLine(shell, text, quiet=quiet, cancel=cancel)
    try:
        yield line
    except BaseException:
        line.done(f"{text}: not done")
        raise
    finally:
        line.close()
