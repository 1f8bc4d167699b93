"""Completing what is typed after our magics and in the bodies of hooks: sites, options, names, members."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

from flexmagic.layout.patterns import split_list
from flexmagic.layout.sites import PORTS
from flexmagic.magics.options import (
    CLUSTER,
    GROUP,
    HOOK,
    LOSS,
    PARAMETER,
    SITE,
    Typing,
    arguments,
    options,
    typing,
)

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.client.known import Known
    from flexmagic.magics.desk import Desk

_LINE = re.compile(r"\s*(?:[\w., ]+=\s*)?(?P<kind>%%?)(?P<name>flex\w+)(?P<rest>\s.*)$", re.DOTALL)
_MEMBER = re.compile(
    r"(?<![\w.\])])(?P<names>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?P<link>\.|\[\"?)(?P<typed>\w*)$"
)
_NONE = SimpleMatcherResult(completions=[], suppress=False)
BODIES = ("flexhook",)
"""The cells whose body runs at a site on the engines."""


class Completion:
    """IPython's matcher for everything of ours; IPython's own are asked where this one knows nothing."""

    def __init__(self, shell: InteractiveShell, desk: Desk) -> None:
        self._shell = shell
        self._desk = desk

        @context_matcher(identifier="flexmagic", priority=100)
        def matcher(context: CompletionContext) -> SimpleMatcherResult:
            return self.complete(context.full_text, context.cursor_line, context.cursor_position)

        self._matcher = matcher

    def add(self) -> None:
        """Have the shell ask here first."""
        self._shell.Completer.custom_matchers.append(self._matcher)

    def remove(self) -> None:
        """Leave the shell's completer as it was."""
        self._shell.Completer.custom_matchers.remove(self._matcher)

    def complete(self, text: str, line: int, column: int) -> SimpleMatcherResult:
        """What can follow at a place of a cell."""
        lines = text.split("\n")
        before = lines[line][:column] if line < len(lines) else ""
        magic = _LINE.match(before)
        if magic is not None and (magic["kind"] == "%" or line == 0):
            return self._option(magic["kind"], magic["name"], magic["rest"])
        opening = _LINE.match(lines[0] + " ")
        if line and opening is not None and opening["kind"] == "%%" and opening["name"] in BODIES:
            return self._member(opening["name"], opening["rest"], before)
        return _NONE

    @property
    def _known(self) -> Known | None:
        return self._desk.session.known if self._desk.has_session else None

    def _option(self, kind: str, name: str, rest: str) -> SimpleMatcherResult:
        magics = self._shell.magics_manager.magics["cell" if kind == "%%" else "line"]
        if name not in magics:
            return _NONE
        there = options(magics[name])
        now = typing(there, rest)
        if now.option is None and now.typed.startswith("-"):
            flags = [flag for option in there for flag in option.flags]
            return _result((f for f in flags if f.startswith(now.typed)), now.typed, "option")
        return _result(self._values(now), now.typed, now.option.kind if now.option else "")

    def _values(self, now: Typing) -> list[str]:
        """What can stand where a word is typed."""
        if now.option is None:
            return []
        found = [word for word in now.option.words if word.startswith(now.typed)]
        kinds, known = now.option.kind.split(), self._known
        if CLUSTER in kinds:
            from flexmagic.client.running_clusters import running

            found += [name for name in running() if name.startswith(now.typed)]
        if known is None:
            return found
        if SITE in kinds:
            found += sites(known, now.typed)
        if PARAMETER in kinds:
            found += known.parameters(now.typed)
        if HOOK in kinds:
            found += [_quoted(name) for name in known.hooks if name.startswith(now.typed)]
        if GROUP in kinds:
            found += [_quoted(name) for name in known.groups if name.startswith(now.typed)]
        if LOSS in kinds:
            found += [name for name in self._desk.session.losses if name.startswith(now.typed)]
        return found

    def _member(self, magic: str, rest: str, before: str) -> SimpleMatcherResult:
        """What a name in a hook's body has inside, by the engines' own objects."""
        found = _MEMBER.search(before)
        if found is None or self._known is None:
            return _NONE
        there = options(self._shell.magics_manager.magics["cell"][magic])
        where = next((split_list(word)[0] for word in arguments(there, rest) if split_list(word)), "")
        members = self._known.members(where.partition(":")[0], found["names"].split("."))
        typed = found["typed"]
        if found["link"] != ".":
            quoted = found["link"][1:] + typed
            keys = [key[1:] for key in members if key.startswith('["')]
            return _result((k for k in keys if k.startswith(quoted or '"')), quoted, "key")
        names = [n for n in members if n.isidentifier() and n.startswith(typed)]
        hidden = typed.startswith("_")
        return _result((n for n in names if hidden or not n.startswith("_")), typed, "attribute")


def sites(known: Known, typed: str) -> list[str]:
    """The sites whose names can follow what is typed: the next part of a path, or ports."""
    path, colon, port = typed.partition(":")
    if not colon:
        return known.modules(typed)
    there = known.ports(path) or list(PORTS)
    return [f"{path}:{one}" for one in dict.fromkeys([*there, *PORTS]) if one.startswith(port)]


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[^\s,\"']+", name) else f'"{name}"'


def _result(texts: Iterable[str], typed: str, kind: str) -> SimpleMatcherResult:
    """A matcher's answer; others are only asked if it is empty."""
    found = [SimpleCompletion(text, type=kind or None) for text in texts]
    return SimpleMatcherResult(completions=found, suppress=bool(found), matched_fragment=typed, ordered=True)
