"""Parsing shared by the magics: one sentence for a wrong option, quotes taken off texts."""

from __future__ import annotations

import ast
import inspect
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import parse_argstring
from IPython.utils.text import DollarFormatter

from flexmagic.errors import InputError
from flexmagic.layout.patterns import split_list

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping, Sequence

    from IPython.core.interactiveshell import InteractiveShell


_NEGATIVE = re.compile(r"(--(?:step|row|token))\s+(-[\d:])")
"""Positions that start with a minus, which would be read as an option."""


def parse(magic: Any, line: str) -> Namespace | None:
    """The options of a magic's line; ``None`` if help was asked for, which is then printed.

    Raises :class:`InputError` in one sentence for what is wrong.
    """
    if line.split() in (["-h"], ["--help"]):
        print(inspect.getdoc(magic))
        return None
    try:
        return parse_argstring(magic, _NEGATIVE.sub(r"\1=\2", line))
    except ValueError as error:  # an open quote
        msg = f"{error}: put a text that holds an apostrophe in double quotes."
        raise InputError(msg) from None
    except UsageError as error:
        name = magic.argcmd_name if hasattr(magic, "argcmd_name") else magic.__name__
        said = str(error).strip().splitlines()[-1] if str(error).strip() else "wrong options"
        wrong = [word for word in said.split() if word.startswith("--")]
        flags = [flag for action in magic.parser._actions for flag in action.option_strings]  # noqa: SLF001
        near = [flag for word in wrong for flag in get_close_matches(word, flags, 1)]
        meant = f" Did you mean {' and '.join(near)}?" if "unrecognized" in said and near else ""
        msg = f"{said}.{meant} Type %{name}? for its options."
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
    return [part for word in words for part in split_list(_bare(word))]


def names(words: Sequence[str]) -> list[str]:
    """Names, separated by blanks or commas; a quoted one may hold both."""
    return [n for w in words for n in ([_bare(w)] if _bare(w) != w else split_list(w))]


def _bare(word: str) -> str:
    """A word without the quotes around it, as it stands: a regular expression has backslashes."""
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word


_CHOICE = re.compile(r"\{(\d+\.\.\d+|[\w.*]+(?:\s*,\s*[\w.*]+)+|\d+)\}|(?<![^\s,\"'])/\S+/(?=[:\s,\"']|$)")
"""The braces of a site pattern, and a regular expression: what is no Python expression in a line."""


def expanded(shell: InteractiveShell | None, line: str, local_ns: Mapping[str, Any] | None) -> str:
    """The line with ``{expression}`` and ``$name`` replaced as IPython does, site patterns left alone."""
    assert shell is not None  # registered on one
    kept = _CHOICE.sub(lambda match: match[0].replace("{", "{{").replace("}", "}}"), line)
    try:
        return str(DollarFormatter().vformat(kept, (), {**shell.user_ns, **(local_ns or {})}))
    except Exception:  # noqa: BLE001 - as IPython: what cannot be expanded stays as it was typed
        return line


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip


def bytes_of(text: str) -> int:
    """``4GB`` or ``512MiB`` in bytes; raises :class:`InputError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        msg = f"{text!r} is no size. Type a number and a unit, e.g. 4GB or 512MiB."
        raise InputError(msg)
    return int(float(found[1]) * _UNITS[found[2].upper()])
