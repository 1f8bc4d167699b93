"""What the magics of one notebook share: its session, and the ways to show and to wait."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from IPython.core.magic import Magics

from flexmagic.errors import ClusterError, FlexError, StuckError, UserCodeError
from flexmagic.magics.arguments import bytes_of
from flexmagic.magics.attending import Attending
from flexmagic.magics.restart import kernel_name
from flexmagic.magics.settings import FlexMagic
from flexmagic.magics.status_line import TICK, waiting

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.client.session import Session
    from flexmagic.client.waiting import Waited
    from flexmagic.magics.cells import EngineCells
    from flexmagic.magics.owners import OwnersMagics
    from flexmagic.workshop.guest import Guest
    from flexmagic.workshop.serving import Server


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
        session.attend(Attending(self.shell, session.cancel))
        self._session = session
        self._reopen(session)

    def _reopen(self, session: Session) -> None:
        """Go on with the workshop that was open in this notebook before its kernel restarted, if one was."""
        kernel = kernel_name(self.shell)
        if not kernel or self.workshop is not None:
            return
        from flexmagic.workshop.opening import announcement, left_by, open_workshop

        if left_by(session, kernel):
            try:
                if session._calls.ended():  # noqa: SLF001 - else the workshop does it, which finds less
                    print(session.recover())
                self.workshop = open_workshop(session.cluster_name, kernel=kernel)
            except FlexError as error:
                print(f"The workshop of before the restart could not be opened again: {error}")
            else:
                print(announcement(self.workshop))

    def take_guest(self, guest: Guest) -> None:
        """Make a place in a workshop the notebook's session, which refuses what is its owner's."""
        self._session = cast("Session", guest)
        self.owners.refuse()

    @property
    def guest(self) -> Guest | None:
        """The notebook's place in somebody's workshop, if that is what it has."""
        return cast("Guest", self._session) if self._session and self.is_guest(self._session) else None

    @staticmethod
    def is_guest(session: Session) -> bool:
        """Whether a session is a place in a workshop."""
        from flexmagic.workshop.guest import Guest

        return isinstance(session, Guest)

    def expect(self, what: str, begin: Callable[[Callable[[Waited | str], None]], Session]) -> None:
        """Let a session come while cells already run; the first that needs it waits for it.

        ``begin`` makes it, and is given whom to tell how far that is.
        """
        executor = ThreadPoolExecutor(1, thread_name_prefix="flexmagic")
        heard: list[Waited | str] = [""]
        self._coming = Coming(what, executor.submit(begin, lambda far: heard.__setitem__(0, far)), heard)
        executor.shutdown(wait=False)

    def _arrive(self, coming: Coming) -> None:
        """Wait for a session that is on its way; raises what it ended with, once."""
        if not coming.future.done():
            with waiting(self.shell, coming.what) as status:
                while not coming.future.done():
                    concurrent.futures.wait([coming.future], timeout=TICK)
                    (far,) = coming.heard
                    status.tick(None, far) if isinstance(far, str) else status.tick(far)
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
            except KeyboardInterrupt as error:
                if said := str(error):  # it says where the ranks were, not how we waited for them
                    vars(error)["_render_traceback_"] = lambda: [f"KeyboardInterrupt: {said}"]
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
    """A session that is being made: what is done for it, the promise of it, and how far it is by now."""

    what: str
    future: Future[Session]
    heard: list[Waited | str]


class DeskMagics(Magics):
    """A family of magics at one desk."""

    def __init__(self, shell: InteractiveShell, desk: Desk) -> None:
        super().__init__(shell)
        self._desk = desk
        for kind, sign in (("line", "%"), ("cell", "%%")):
            for name, call in self.magics[kind].items():
                self.magics[kind][name] = desk.quoting(f"{sign}{name}", call)
