"""Parsing shared by the magics: one sentence for a wrong option, quotes taken off texts."""

from __future__ import annotations

import ast
import inspect
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import parse_argstring

from flexmagic.errors import InputError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence


def parse(magic: Any, line: str) -> Namespace | None:
    """The options of a magic's line; ``None`` if help was asked for, which is then printed.

    Raises :class:`InputError` in one sentence for what is wrong.
    """
    if line.split() in (["-h"], ["--help"]):
        print(inspect.getdoc(magic))
        return None
    try:
        return parse_argstring(magic, line)
    except ValueError as error:  # an open quote
        msg = f"{error}: put a text that holds an apostrophe in double quotes."
        raise InputError(msg) from None
    except UsageError as error:
        name = magic.argcmd_name if hasattr(magic, "argcmd_name") else magic.__name__
        said = str(error).strip().splitlines()[-1] if str(error).strip() else "wrong options"
        msg = f"{said}. Type %{name}? for its options."
        raise InputError(msg) from None


def unquoted(word: str) -> str:
    """A word without the quotes around it, escapes read as Python reads them."""
    if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'":
        try:
            return str(ast.literal_eval(word))
        except (SyntaxError, ValueError):
            return word[1:-1]
    return word


def texts(words: Sequence[str]) -> list[str]:
    """The prompts on a line: each quoted word is one; words without any quotes are one prompt."""
    if any(word[:1] in {'"', "'"} for word in words):
        return [unquoted(word) for word in words]
    return [" ".join(words)] if words else []


def sites(words: Sequence[str]) -> list[str]:
    """Site patterns, separated by blanks or commas."""
    return [part for word in words for part in unquoted(word).split(",") if part]
