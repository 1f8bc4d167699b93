"""The `flexmagic` command: reads the options, calls the command, turns errors into one sentence.

Each command is imported when it is called, so that `--version` and `--help` answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from flexmagic.errors import FlexError, InputError

USAGE_ERROR = 2
"""Exit code for an option or a value that cannot be used, as argparse has it."""


class _Parser(argparse.ArgumentParser):
    """Argparse's parser that says what is wrong in one sentence, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message}. Type `{self.prog} --help` for the options.\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command and option; nothing heavy is imported."""
    parser = _Parser(
        prog="flexmagic",
        description="Work on the inside of a distributed PyTorch model from a notebook.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=_Parser)
    _add_demo(commands)
    _add_kernel(commands)
    _add_doctor(commands)
    _add_workshop(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="two engines, a small model in two halves, hooks, a report and a page to look at",
        allow_abbrev=False,
    )
    demo.add_argument("--engines", type=int, default=2, metavar="N", help="engines to start (default: 2)")
    demo.add_argument("--model", metavar="PATH", help="model directory (default: the one that is shipped)")
    demo.add_argument(
        "--html",
        default="flexmagic-demo.html",
        metavar="PATH",
        help="where the page goes (default: %(default)s)",
    )
    demo.add_argument("--no-notebook", action="store_true", help="only the report, no page")
    demo.set_defaults(call=_call_demo)


def _add_kernel(commands: argparse._SubParsersAction[_Parser]) -> None:
    kernel = commands.add_parser("kernel", help="install or remove the Jupyter kernel", allow_abbrev=False)
    actions = kernel.add_subparsers(dest="action", metavar="action", parser_class=_Parser, required=True)
    for action in ("install", "uninstall"):
        parser = actions.add_parser(action, help=f"{action} the kernel", allow_abbrev=False)
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--user", action="store_true", help="for this user, whatever the environment")
        where.add_argument("--prefix", metavar="P", help="under P/share/jupyter/kernels")
        where.add_argument("--sys-prefix", action="store_true", help="in this Python environment (default)")
        parser.add_argument("--name", default="flexmagic", help="the kernel's name (default: %(default)s)")
        if action == "install":
            parser.add_argument("--engines", type=int, metavar="N", help="start N engines with the kernel")
            parser.add_argument("--profile", default="", metavar="P", help="attach to this running cluster")
            parser.add_argument("--model", default="", metavar="PATH", help="load this model with the kernel")
    kernel.set_defaults(call=_call_kernel)


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="look whether all is there that flexmagic needs, and say how to mend it",
        allow_abbrev=False,
    )
    doctor.set_defaults(call=_call_doctor)


def _add_workshop(commands: argparse._SubParsersAction[_Parser]) -> None:
    workshop = commands.add_parser(
        "workshop", help="let guests work on a running cluster's model", allow_abbrev=False
    )
    actions = workshop.add_subparsers(dest="action", metavar="action", parser_class=_Parser, required=True)
    serve = actions.add_parser("serve", help="be the gateway until interrupted", allow_abbrev=False)
    serve.add_argument("--profile", metavar="P", help="the running cluster's id or profile")
    serve.add_argument("--guests", type=int, default=30, metavar="N", help="how many there may be")
    serve.add_argument("--limits", default="", metavar="TEXT", help='such as "runs=20 captured=64MB"')
    serve.add_argument("--host", default="127.0.0.1", help="where to listen; beyond this machine with TLS")
    serve.add_argument("--hub", action="store_true", help="be a service of JupyterHub, for the hub's users")
    serve.add_argument("--port", type=int, default=0, help="the port (any that is free)")
    serve.add_argument("--together", type=int, default=16, metavar="N", help="runs that may share a forward")
    serve.add_argument("--log", metavar="FILE", help="where the log goes, a JSON line for each run")
    serve.add_argument("--every", type=float, default=10.0, metavar="S", help="seconds between two reports")
    serve.add_argument(
        "--trust-guests",
        action="store_true",
        help="run the code of guests' hooks in the engines, not in boxes",
    )
    serve.set_defaults(call=_call_workshop)
    close = actions.add_parser(
        "close", help="end a workshop for good whose gateway has stopped", allow_abbrev=False
    )
    close.add_argument("--profile", metavar="P", help="the running cluster's id or profile")
    close.set_defaults(call=_call_workshop_close)


def _call_workshop(args: argparse.Namespace) -> None:
    from flexmagic.cli.workshop import serve

    serve(
        profile=args.profile, guests=args.guests, limits=args.limits, host=args.host, port=args.port,
        trusted=args.trust_guests, together=args.together, log=args.log, every=args.every,
        hub=args.hub,
    )  # fmt: skip


def _call_workshop_close(args: argparse.Namespace) -> None:
    from flexmagic.cli.workshop import close

    close(profile=args.profile)


def _call_doctor(_args: argparse.Namespace) -> None:
    from flexmagic.cli.doctor import run_doctor

    run_doctor()


def _call_demo(args: argparse.Namespace) -> None:
    from flexmagic.cli.demo import run_demo

    run_demo(engines=args.engines, model=args.model, page=None if args.no_notebook else args.html)


def _call_kernel(args: argparse.Namespace) -> None:
    import flexmagic_kernel

    if args.action == "install":
        start = flexmagic_kernel.Start(args.engines, args.profile, args.model)
        path = flexmagic_kernel.install(args.name, user=args.user, prefix=args.prefix, start=start)
        print(f"Installed the kernel {flexmagic_kernel.kernel_json(start)['display_name']!r} in {path}")
    else:
        path = flexmagic_kernel.uninstall(args.name, user=args.user, prefix=args.prefix)
        print(f"Removed the kernel {args.name!r} from {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 0, 1 (it failed), 2 (it was asked wrongly) or 130."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from importlib.metadata import version

        print(f"flexmagic {version('flexmagic')}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    try:
        args.call(args)
    except FlexError as error:
        print(f"flexmagic: {error}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("flexmagic: interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
