"""``%flexcluster``: start, look at, attach to and stop the engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import ClusterError, InputError
from flexmagic.magics.arguments import bytes_of, parse
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.restart import kernel_name
from flexmagic.magics.status_line import has_front_end, waiting
from flexmagic.magics.workshop import notice_board

if TYPE_CHECKING:
    from flexmagic.client.table import Table

ACTIONS = ("status", "start", "attach", "join", "recover", "limit", "stop")


@magics_class
class ClusterMagics(DeskMagics):
    """The cluster of engines, one per rank."""

    @magic_arguments()
    @argument(
        "action",
        nargs="?",
        default="status",
        help="start, attach, join, status (the default), recover, limit or stop",
    )
    @argument(
        "name",
        nargs="?",
        help="attach: the id or profile of the running cluster, if there are several; "
        "join: the address of a workshop",
    )
    @argument("--as", dest="guest", metavar="NAME", help="join: your name in the workshop")
    @argument("-n", type=int, help="start: how many engines, one per rank (default: FlexMagic.engines)")
    @argument("--keep", action="store_true", help="start: leave the engines running when the notebook ends")
    @argument("--oversubscribe", action="store_true", help="start: let several engines share a device")
    @argument("--hooks", action="store_true", help="attach: copy the hooks of other notebooks at work")
    @argument("--run", type=float, metavar="SECONDS", help="limit: what a call may take; 0 for any time")
    @argument(
        "--alone", type=float, metavar="SECONDS", help="limit: user code while the other ranks wait for it"
    )
    @argument(
        "--recover", choices=("on", "off"), help="limit: start an engine again that had to be ended (on)"
    )
    @argument("--captures", metavar="SIZE", help="limit: what each rank keeps of runs, e.g. 4GB")
    @argument(
        "--force",
        action="store_true",
        help="stop: end the engines even if another notebook started them; "
        "recover: make the process groups again even if nothing seems wrong",
    )
    @line_magic
    def flexcluster(self, line: str) -> Table | None:
        """Start, attach to, show, mend or stop the cluster of engines.

        Examples::

            %flexcluster start -n 2
            %flexcluster            (who is there, and in what state)
            %flexcluster attach flexmagic-1a2b3c
            %flexcluster join 127.0.0.1:4000/TOKEN    (a place in somebody's workshop)
            %flexcluster limit --run 60 --captures 4GB
            %flexcluster recover    (start engines again that ended, free those that hang)
            %flexcluster stop
        """
        args = parse(self.flexcluster, line)
        if args is None:
            return None
        if args.action not in ACTIONS:
            msg = f"%flexcluster has no action {args.action!r}. Actions: {', '.join(ACTIONS)}."
            raise InputError(msg)
        action: Any = getattr(self, f"_{args.action}")
        table: Table | None = action(args)
        return table

    def _start(self, args: Any) -> Table:
        self._refuse_second()
        from flexmagic.client.session import Session

        settings = self._desk.settings
        n = settings.engines if args.n is None else args.n
        with waiting(self._desk.shell, f"Starting {n} engines") as status:
            session = Session.start(
                n,
                keep=args.keep or settings.keep,
                oversubscribe=args.oversubscribe or settings.oversubscribe,
                progress=lambda up, what: status.say(f"Starting {n} engines: {up} up, {what}"),
            )
            self._desk.take(session)
            status.done(f"{n} engines are up")
        return session.status()

    def _attach(self, args: Any) -> Table:
        self._refuse_second()
        from flexmagic.client.session import Session

        kernel = kernel_name(self._desk.shell)
        with waiting(self._desk.shell, "Attaching, after what other notebooks are running") as status:
            self._desk.take(Session.attach(args.name, hooks=args.hooks, kernel=kernel))
            status.done(f"Attached to {self._desk.session.cluster_name}")
        return self._desk.session.status()

    def _join(self, args: Any) -> Table:
        self._refuse_second()
        from flexmagic.workshop.guest import Guest

        if args.name is None:
            raise InputError(
                "Join which workshop? Copy the line that its owner sent: %flexcluster join ADDRESS."
            )
        guest = Guest.join(args.name, args.guest or "")
        self._desk.take_guest(guest)
        if guest.notice:
            print(guest.notice)
        print(f"You are {guest.name}. To come back to this place: %flexcluster join {guest.address}")
        if has_front_end(self._desk.shell):
            notice_board(guest)
        return guest.status()

    def _refuse_second(self) -> None:
        if self._desk.has_session:
            msg = (
                f"A cluster is running: {self._desk.session}. "
                "Type %flexcluster status to see it, or %flexcluster stop before starting another."
            )
            raise ClusterError(msg)

    def _status(self, _args: Any) -> Table:
        return self._desk.session.status()

    def _recover(self, args: Any) -> None:
        with waiting(self._desk.shell, "Recovering") as status:
            done = self._desk.session.recover(
                force=args.force, say=lambda what: status.say(f"Recovering: {what}")
            )
            status.done("Recovered")
        print(done)

    def _limit(self, args: Any) -> None:
        captures = None if args.captures is None else bytes_of(args.captures)
        recover = None if args.recover is None else args.recover == "on"
        self._desk.session.limit(run=args.run, alone=args.alone, captures=captures, recover=recover)

    def _stop(self, args: Any) -> None:
        session = self._desk.drop()
        if self._desk.is_guest(session):
            session.stop()
            print("You left the workshop. Your hooks and runs are kept there for a while.")
            return
        if not (session.owns_engines or args.force):
            session.stop()
            print(
                f"Left {session.cluster_name}: its engines still run, for whoever started them. "
                f"To end them: %flexcluster attach {session.cluster_name}, then %flexcluster stop --force."
            )
            return
        with waiting(self._desk.shell, "Stopping the engines") as status:
            session.shutdown_engines()
            status.done(f"{session.world_size} engines are stopped")
