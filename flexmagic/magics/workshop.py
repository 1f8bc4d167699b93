"""``%flexworkshop``: let guests work on the loaded model, and see to them; and what guests do there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import ClusterError, InputError
from flexmagic.magics.arguments import parse, unquoted
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.inputs import value_of
from flexmagic.magics.restart import kernel_name
from flexmagic.magics.status_line import has_front_end, waiting

if TYPE_CHECKING:
    from flexmagic.client.hooks import Hook
    from flexmagic.workshop.guest import Guest
    from flexmagic.workshop.serving import Server

ACTIONS = (
    "panel", "status", "open", "close", "pause", "resume", "drop", "limit", "send", "show", "collect",
)  # fmt: skip
"""What its owner does."""

GUESTS = ("panel", "status", "take", "view")
"""What a guest does."""


@magics_class
class WorkshopMagics(DeskMagics):
    """Both sides of a workshop."""

    @magic_arguments()
    @argument(
        "action",
        nargs="?",
        default="panel",
        help="open, close, panel (the default), status, pause, resume, drop, limit, send, show or collect; "
        "as a guest: take or view",
    )
    @argument(
        "words",
        nargs="*",
        help="drop: the guest's name; limit: such as runs=20 captured=64MB; send, take: a hook's name; "
        "show: an activation; collect: a site and mean, std, norm, rms, min, max, zeros, nan or n; "
        "view: its number",
    )
    @argument("--guests", type=int, default=30, metavar="N", help="open: how many there may be (30)")
    @argument("--limits", metavar="TEXT", default="", help='open: "tokens=512 runs=20 seconds=10 moved=1GB"')
    @argument("--host", default="127.0.0.1", help="open: where to listen; beyond this machine with TLS")
    @argument("--port", type=int, default=0, help="open: the port (any that is free)")
    @argument(
        "--trust-guests",
        action="store_true",
        help="open: run the code of guests' hooks in the engines themselves, not in boxes",
    )
    @argument(
        "--together",
        type=int,
        default=16,
        metavar="N",
        help="open: runs that may share a forward; 1 for none",
    )
    @argument("--log", metavar="FILE", help="open: where the log goes, a JSON line for each run")
    @line_cell_magic
    def flexworkshop(self, line: str, cell: str | None = None) -> Any:
        """Open the loaded model to guests, and keep an eye on them.

        Examples::

            %flexworkshop open --guests 30 --limits "runs=20 seconds=10"
            %flexworkshop             (who is there, what waits, what was taken, what failed; with buttons)
            %flexworkshop status      (the same as a table)
            %flexworkshop pause
            %flexworkshop limit captured=64MB
            %flexworkshop drop ann
            %flexworkshop send damp   (offer this hook to all; or %%flexworkshop send, then the hook's cell)
            %flexworkshop show run["model.layers.3.mlp"]
            %flexworkshop collect model.layers.3.mlp norm
            %flexworkshop close

            %flexworkshop             (as a guest: what the owner has sent)
            %flexworkshop take damp   (the hook that is offered, as a cell of your own)
            %flexworkshop view        (what the owner shows)
        """
        args = parse(self.flexworkshop, line)
        if args is None:
            return None
        if cell is not None and args.action != "send":
            raise InputError("A cell is what is sent: %%flexworkshop send, and below it the hook's cell.")
        guest = self._desk.guest
        if guest is not None and args.action not in {"open", *GUESTS} and args.action in ACTIONS:
            raise ClusterError(f"{args.action} is the owner's in a workshop. You have take and view.")
        if args.action not in (ACTIONS if guest is None else ("open", *GUESTS)):
            known = ", ".join(ACTIONS if guest is None else GUESTS)
            raise InputError(f"%flexworkshop has no action {args.action!r}. Actions: {known}.")
        if args.action == "open":
            return self._open(args)
        return self._do(args, cell) if guest is None else self._guests(guest, args)

    def _open(self, args: Any) -> Server:
        from flexmagic.workshop.opening import announcement, open_workshop

        if self._desk.workshop is not None:
            raise ClusterError("A workshop is open. Type %flexworkshop close before you open another.")
        if self._desk.is_guest(self._desk.session):
            raise ClusterError("You are a guest yourself: a workshop is opened by the cluster's owner.")
        with waiting(self._desk.shell, "Opening the workshop") as status:
            self._desk.workshop = server = open_workshop(
                self._desk.session.cluster_name, guests=args.guests, limits=unquoted(args.limits),
                host=args.host, port=args.port, trusted=args.trust_guests, together=args.together,
                journal=None if args.log is None else unquoted(args.log),
                kernel=kernel_name(self._desk.shell),
            )  # fmt: skip
            status.done("The workshop is open")
        print(announcement(server))
        return server

    def _do(self, args: Any, cell: str | None) -> Any:
        server = self._desk.workshop
        if server is None:
            raise ClusterError("No workshop is open. Type %flexworkshop open.")
        workshop = server.workshop
        if args.action == "close":
            self._desk.workshop = None
            server.close()
            print("The workshop is closed. The engines and the model are as they were.")
            return None
        if args.action in {"send", "show", "collect"}:
            return self._teach(server, args, cell)
        if args.action == "drop":
            if len(args.words) != 1:
                raise InputError("Drop whom? %flexworkshop drop NAME")
            workshop.drop(unquoted(args.words[0]))
        elif args.action == "limit":
            print(workshop.limit(" ".join(args.words)))
        elif args.action in {"pause", "resume"}:
            getattr(workshop, args.action)()
        elif args.action == "panel" and has_front_end(self._desk.shell):
            self._panel(server)
            return None
        return workshop.status()

    def _panel(self, server: Server) -> None:
        from flexmagic.view.workshop_panel import WorkshopPanel

        def hooks() -> list[Hook]:
            return list(self._desk.session.hooks) if self._desk.has_session else []

        panel = WorkshopPanel(server, hooks, lambda text: value_of(self.shell, "show", text))
        panel.show(server.workshop.status())

    def _teach(self, server: Server, args: Any, cell: str | None) -> Any:
        """Send, show or collect."""
        lesson, words = server.workshop.lesson, " ".join(args.words)
        if args.action == "collect":
            if len(args.words) not in {1, 2}:
                raise InputError("Collect what? %flexworkshop collect SITE mean")
            return lesson.collect(*map(unquoted, args.words))
        if args.action == "show":
            if not words:
                raise InputError('Show what? %flexworkshop show run["model.layers.3.mlp"]')
            notice = lesson.show(value_of(self.shell, "show", words))
        else:
            if bool(words) == bool(cell):
                raise InputError(
                    "Send which hook? %flexworkshop send NAME, or %%flexworkshop send and below it its cell."
                )
            notice = lesson.send(cell or self._desk.session.hooks[unquoted(words)])
        print(f"{notice.said} Guests hear of it now, or after their next cell.")
        return None

    def _guests(self, guest: Guest, args: Any) -> Any:
        """What a guest asks for."""
        words = unquoted(" ".join(args.words))
        if args.action == "take":
            assert self.shell is not None  # registered on one
            self.shell.set_next_input(guest.notices.cell(words))
            return None
        if args.action == "view":
            if words and not words.isdigit():
                raise InputError("View which? %flexworkshop view, or its number: %flexworkshop view 3")
            return guest.notices.view(int(words) if words else None)
        if args.action == "panel" and has_front_end(self._desk.shell):
            notice_board(guest)
            return None
        return guest.notices.table()


def notice_board(guest: Guest) -> None:
    """Show a guest what the owner has sent, and what comes; in a notebook."""
    from flexmagic.view.workshop_panel import NoticeBoard

    NoticeBoard(guest).show(guest.notices.table())
    guest.notices.new()  # it is on the board now
