"""What the magics of one notebook share: its session, and the ways to show and to wait."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from IPython.core.magic import Magics
from IPython.display import display

from flexmagic.errors import ClusterError, FlexError, StuckError, UserCodeError
from flexmagic.magics.arguments import bytes_of
from flexmagic.magics.settings import FlexMagic

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.client.session import Session
    from flexmagic.client.waiting import Waited
    from flexmagic.magics.cells import EngineCells
    from flexmagic.magics.owners import OwnersMagics
    from flexmagic.view.cancel import CancelButton
    from flexmagic.workshop.guest import Guest
    from flexmagic.workshop.serving import Server


TICK, OFFER = 0.2, 1.0
"""Seconds between two looks at the clock in a status line, and after which it can be cancelled."""


class Helper(Protocol):
    """What stands beside the magics in a shell while the extension is loaded."""

    def add(self) -> None:
        """Begin."""

    def remove(self) -> None:
        """Leave the shell as it was."""


class Desk:
    """The one session of a notebook, and how the magics speak to the user."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        manager = shell.magics_manager
        self.magics_before = {(kind, name) for kind, magics in manager.magics.items() for name in magics}
        self.magics_before |= {("registry", name) for name in manager.registry}
        self.settings = FlexMagic(shell)
        self._session: Session | None = None
        self._coming: Coming | None = None
        self.cells: EngineCells
        self.owners: OwnersMagics
        self.workshop: Server | None = None
        self.last_error: FlexError | None = None
        self.helpers: tuple[Helper, ...] = ()

    @property
    def session(self) -> Session:
        """The session; raises :class:`ClusterError` before a start."""
        if self._coming is not None:
            self._arrive(self._coming)
        if self._session is None:
            msg = f"No cluster is running. Type %flexcluster start -n {self.settings.engines}."
            raise ClusterError(msg)
        return self._session

    @property
    def has_session(self) -> bool:
        """Whether a cluster was started or attached to; one that is on its way counts once it is there."""
        if self._coming is not None and self._coming.future.done():
            self._arrive(self._coming)
        return self._session is not None

    def take(self, session: Session) -> None:
        """Make a session the notebook's, under its settings."""
        settings = self.settings
        session.limit(
            run=settings.run_limit,
            alone=settings.alone_limit,
            captures=bytes_of(settings.captures) if settings.captures else None,
        )
        self._session = session

    def take_guest(self, guest: Guest) -> None:
        """Make a place in a workshop the notebook's session, which refuses what is its owner's."""
        self._session = cast("Session", guest)
        self.owners.refuse()

    @staticmethod
    def is_guest(session: Session) -> bool:
        """Whether a session is a place in a workshop."""
        from flexmagic.workshop.guest import Guest

        return isinstance(session, Guest)

    def expect(self, what: str, begin: Callable[[], Session]) -> None:
        """Let a session come while cells already run; the first that needs it waits for it."""
        executor = ThreadPoolExecutor(1, thread_name_prefix="flexmagic")
        self._coming = Coming(what, executor.submit(begin))
        executor.shutdown(wait=False)

    def _arrive(self, coming: Coming) -> None:
        """Wait for a session that is on its way; raises what it ended with, once."""
        if not coming.future.done():
            with waiting(self.shell, coming.what) as status:
                while not coming.future.done():
                    concurrent.futures.wait([coming.future], timeout=TICK)
                    status.tick()
                status.done(coming.what)
        self._coming = None
        self.take(coming.future.result())

    def drop(self) -> Session:
        """Give the session away, its workshop closed; raises as :attr:`session` does."""
        if self.workshop is not None:
            self.workshop.close()
            self.workshop = None
        session, self._session = self.session, None
        self.owners.remove()
        return session

    def quoting(self, name: str, magic: Callable[..., Any]) -> Callable[..., Any]:
        """A magic whose errors quote the line that was typed, and are remembered for ``%flextb``."""

        @functools.wraps(magic)
        def call(line: str, *args: Any, **kwargs: Any) -> Any:
            try:
                return magic(line, *args, **kwargs)
            except FlexError as error:
                self.last_error = error
                ran = isinstance(error, StuckError) or (isinstance(error, UserCodeError) and error.failures)
                if not ran:  # what ran is quoted in the message
                    error.typed = f"{name} {line}".strip()
                raise

        return call

    def leave(self) -> None:
        """End the session, if any, as the end of the notebook would."""
        if self.workshop is not None:
            self.workshop.close()
            self.workshop = None
        if self._coming is not None:
            with contextlib.suppress(FlexError):
                self._arrive(self._coming)
        if self._session is not None:
            with contextlib.suppress(FlexError):
                self._session.leave()
            self._session = None


@dataclass(frozen=True)
class Coming:
    """A session that is being made: what is done for it, and the promise of it."""

    what: str
    future: Future[Session]


class DeskMagics(Magics):
    """A family of magics at one desk."""

    def __init__(self, shell: InteractiveShell, desk: Desk) -> None:
        super().__init__(shell)
        self._desk = desk
        for kind, sign in (("line", "%"), ("cell", "%%")):
            for name, call in self.magics[kind].items():
                self.magics[kind][name] = desk.quoting(f"{sign}{name}", call)


def in_notebook(shell: InteractiveShell) -> bool:
    """Whether a cell of a notebook is running, whose front end can change what it shows.

    A console, or a program that runs a notebook without one, only adds to what is there.
    """
    kernel = getattr(shell, "kernel", None)
    return kernel is not None and "cellId" in (kernel.get_parent().get("metadata") or {})


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
        self._in_notebook = in_notebook(shell)
        self._in_terminal = not hasattr(shell, "kernel") and sys.stdout.isatty()
        self._quiet = quiet
        if not quiet:
            self._show(f"{text} …")

    def say(self, text: str) -> None:
        """Replace the line."""
        self._offer()
        if text != self._text:
            self._text = text
            self._show(f"{text} …")

    def tick(self, waited: Waited | None = None) -> None:
        """Show how long it has taken by now and how far it is, a few times a second; not in a plain log."""
        self._offer()
        passed = time.perf_counter() - self._started
        if passed > self._quiet and passed - self._last > TICK and (self._in_notebook or self._in_terminal):
            self._last = passed
            far = f"{passed:.1f} s" if waited is None else replace(waited, seconds=passed)
            self._show(f"{self._text} … {far}")

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
        if self._cancel is None or not self._in_notebook or time.perf_counter() - self._started < OFFER:
            return
        from flexmagic.view.cancel import cancel_button

        cancel, self._cancel = self._cancel, None
        self._button = cancel_button(self._shell, cancel)

    def _show(self, line: str) -> None:
        if self._in_terminal:
            sys.stdout.write(f"\r\x1b[2K{line}")
            sys.stdout.flush()
        elif not self._in_notebook:
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
