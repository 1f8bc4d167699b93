"""What magics that generate text have in common: their options, and the text shown as it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic_arguments import argument

from flexmagic.errors import InputError
from flexmagic.view.words import visible

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from flexmagic.client.waiting import Waited
    from flexmagic.view.stream import Stream

SAMPLING = ("sample", "temperature", "top_k", "top_p")

OPTIONS = (
    argument(
        "--generate", type=int, metavar="N", help="generate up to N tokens with the model's own generate"
    ),
    argument("--sample", action="store_true", help="generate: sample instead of taking the likeliest token"),
    argument("--temperature", type=float, help="generate: divide the logits by this, to sample"),
    argument(
        "--top-k", type=int, metavar="K", help="generate: sample among the K likeliest tokens; 0 is all"
    ),
    argument("--top-p", type=float, metavar="P", help="generate: sample among the likeliest tokens up to P"),
)


def generating(magic: Any) -> Any:
    """Give a magic these options."""
    for option in reversed(OPTIONS):
        magic = option(magic)
    return magic


def sampling(args: Namespace) -> dict[str, Any]:
    """What of a line's options goes to the model's own ``generate``: naming one asks for sampling."""
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    options = {name: value for name, value in given.items() if value is not None}
    return {"do_sample": True, **options} if options or args.sample else {}


def check_generating(args: Namespace, *one_forward: str) -> None:
    """Raise :class:`InputError` for options that mean nothing together; ``one_forward``: those of one."""
    given = [name for name in one_forward if getattr(args, name) not in {None, False}]
    if args.generate is None and sampling(args):
        msg = "--sample, --temperature, --top-k and --top-p mean something with --generate N only."
    elif args.generate is not None and given:
        msg = f"--{given[0].replace('_', '-')} needs one forward; it cannot be had with --generate."
    else:
        return
    raise InputError(msg)


def telling(say: Callable[[str], None], stream: Stream | None = None) -> Callable[[Waited], None]:
    """What shows the text of a generation as it comes, in a view too if there is one."""

    def progress(waited: Waited) -> None:
        if stream is not None:
            stream.grow(waited.tokens)
        text, done, total = waited.ranks.get(0, ("", 0, 0))
        far = ", ".join(filter(None, [f"{done}/{total}", waited.pace]))
        say(f"Generating {far}: {visible(text, 400)}" if total else "Generating")

    return progress
