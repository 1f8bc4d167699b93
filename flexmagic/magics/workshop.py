"""``%flexworkshop``: let guests work on the loaded model, and see to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import ClusterError, InputError
from flexmagic.magics.arguments import parse, unquoted
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.status_line import waiting

if TYPE_CHECKING:
    from flexmagic.client.table import Table

ACTIONS = ("status", "open", "close", "pause", "resume", "drop", "limit")


@magics_class
class WorkshopMagics(DeskMagics):
    """The owner's side of a workshop."""

    @magic_arguments()
    @argument(
        "action",
        nargs="?",
        default="status",
        help="open, close, status (the default), pause, resume, drop or limit",
    )
    @argument("words", nargs="*", help="drop: the guest's name; limit: such as runs=20 captured=64MB")
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
    @line_magic
    def flexworkshop(self, line: str) -> Table | None:
        """Open the loaded model to guests, and keep an eye on them.

        Examples::

            %flexworkshop open --guests 30 --limits "runs=20 seconds=10"
            %flexworkshop             (who is there, what waits, what was taken, what failed)
            %flexworkshop pause
            %flexworkshop limit captured=64MB
            %flexworkshop drop ann
            %flexworkshop close
        """
        args = parse(self.flexworkshop, line)
        if args is None:
            return None
        if args.action not in ACTIONS:
            raise InputError(f"%flexworkshop has no action {args.action!r}. Actions: {', '.join(ACTIONS)}.")
        if args.action == "open":
            self._open(args)
            return None
        return self._do(args)

    def _open(self, args: Any) -> None:
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
            )  # fmt: skip
            status.done("The workshop is open")
        print(announcement(server))

    def _do(self, args: Any) -> Table | None:
        server = self._desk.workshop
        if server is None:
            raise ClusterError("No workshop is open. Type %flexworkshop open.")
        workshop = server.workshop
        if args.action == "close":
            self._desk.workshop = None
            server.close()
            print("The workshop is closed. The engines and the model are as they were.")
            return None
        if args.action == "drop":
            if len(args.words) != 1:
                raise InputError("Drop whom? %flexworkshop drop NAME")
            workshop.drop(unquoted(args.words[0]))
        elif args.action == "limit":
            print(workshop.limit(" ".join(args.words)))
        elif args.action in {"pause", "resume"}:
            getattr(workshop, args.action)()
        return workshop.status()
