"""What the options of a magic take, read off its parser. Pure."""

from __future__ import annotations

import re
from argparse import ONE_OR_MORE, ZERO_OR_MORE, Action
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from flexmagic.layout.patterns import split_list
from flexmagic.magics import cluster, workshop

SITE, PARAMETER, HOOK, GROUP, LOSS, CLUSTER = "site", "parameter", "hook", "group", "loss", "cluster"
"""Kinds of names that a notebook's session or machine knows."""

_KINDS = {
    "sites": SITE, "SITE": SITE, "parameters": PARAMETER, "group": GROUP, "backward": LOSS,
    **dict.fromkeys(("enable", "disable", "complement", "remove"), f"{HOOK} {GROUP}"),
    **dict.fromkeys(("only", "without"), f"{HOOK} {GROUP}"),
    **dict.fromkeys(("undo", "diff", "edit"), HOOK),
}  # fmt: skip
_ACTIONS = {"flexcluster": cluster.ACTIONS, "flexworkshop": (*workshop.ACTIONS, *workshop.GUESTS[2:])}
_WORDS = {
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "attn": ("eager", "sdpa", "flash_attention_2"),
}
_WORD = re.compile(r'"[^"]*"?|\'[^\']*\'?|\S+')


@dataclass(frozen=True)
class Option:
    """One option or argument: its names, how many words it takes (-1: any number), of what kind or which."""

    flags: tuple[str, ...]
    takes: int
    kind: str = ""
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Typing:
    """What is being typed on a magic's line: the beginning of a word, and what the word is for.

    ``option`` is ``None`` where the name of an option is typed, or what nothing is known of.
    """

    typed: str
    option: Option | None


def options(magic: Any) -> list[Option]:
    """The options of a magic, then its arguments, which have no flags."""
    actions: list[Action] = magic.parser._actions  # noqa: SLF001 - argparse has no other list of them
    words = {**_WORDS, "action": _ACTIONS.get(getattr(magic, "__name__", ""), ())}
    found = [_option(action, words) for action in actions if action.dest != "help"]
    return sorted(found, key=lambda option: not option.flags)


def _option(action: Action, words: Mapping[str, tuple[str, ...]]) -> Option:
    takes = {None: 1, "?": 1, ZERO_OR_MORE: -1, ONE_OR_MORE: -1}.get(cast("str | None", action.nargs), 0)
    kind = _KINDS.get(action.dest) or _KINDS.get(str(action.metavar), "")
    if action.dest == "name" and not action.option_strings:
        kind = CLUSTER
    return Option(tuple(action.option_strings), takes, kind, words.get(action.dest, ()))


def typing(known: list[Option], rest: str) -> Typing:
    """What is being typed at the end of a magic's line; ``rest`` is the line after the magic's name."""
    words = _WORD.findall(rest)
    last = words.pop() if words and not rest[-1:].isspace() else ""
    given, option = _read(known, words)
    if last.startswith("-"):
        flag, equals, value = last.partition("=")
        return Typing(_open(value), _by_flag(known, flag)) if equals else Typing(last, None)
    if option is None:
        arguments = [option for option in known if not option.flags]
        many = arguments[-1:] if arguments and arguments[-1].takes < 0 else []
        option = next(iter([*arguments[len(given) :], *many]), None)
    return Typing(_open(last), option)


def arguments(known: list[Option], rest: str) -> list[str]:
    """The words of a magic's line that belong to no option, without quotes."""
    return [word.strip("\"'") for word in _read(known, _WORD.findall(rest))[0]]


def _read(known: list[Option], words: list[str]) -> tuple[list[str], Option | None]:
    """The words that belong to no option, and the option that the next word would belong to."""
    option, left, given = None, 0, []
    for word in words:
        if word.startswith("--") or (word.startswith("-") and _by_flag(known, word)):
            option = _by_flag(known, word.partition("=")[0])
            left = option.takes if option is not None and "=" not in word else 0
        elif left:
            left -= 1
        else:
            given.append(word)
    return given, option if left else None


def _by_flag(known: list[Option], flag: str) -> Option | None:
    return next((option for option in known if flag in option.flags), None)


def _open(word: str) -> str:
    """The part of a word that is being typed: after an opening quote, and after the last comma of a list."""
    word = word[1:] if word[:1] in {"'", '"'} else word
    if word.endswith(","):
        return ""
    return split_list(word)[-1] if word.strip() else ""
