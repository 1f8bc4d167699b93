"""The magics, their options and our kernel messages are a promise: `magics_list.txt` says which there are.

After a change on purpose: `python tests/test_magics_list.py` writes the list anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flexmagic.client.control import ANSWERS
from flexmagic.magics import FAMILIES
from flexmagic.view.widget import ANSWERS as QUESTIONS

LIST = Path(__file__).with_name("magics_list.txt")


def option(action: argparse.Action) -> str:
    """One option as a user would type it, with what it takes and what it is without."""
    name = ", ".join(action.option_strings) or action.dest
    if action.nargs != 0:
        takes = (
            "|".join(map(str, action.choices)) if action.choices else action.metavar or action.dest.upper()
        )
        many = f" ({action.nargs})" if action.nargs is not None else ""
        kind = f": {action.type.__name__}" if action.type else ""
        name = (f"{name} {takes}" if action.option_strings else name) + many + kind
    if action.default not in (None, False, argparse.SUPPRESS, []):
        name += f" = {action.default!r}"
    return f"{name}\n        {' '.join(str(action.help).split())}"


def summary(function) -> str:
    """The first paragraph of a docstring, in one line; of a magic's, after what its parser has put before."""
    paragraphs = function.__doc__.split("\n\n")
    return " ".join(paragraphs[2 if paragraphs[0] == "::" else 0].split())


def current() -> str:
    """The list as the magics' own parsers give it."""
    kinds: dict[tuple[str, type, str], list[str]] = {}
    for family in FAMILIES:
        for kind, prefix in (("line", "%"), ("cell", "%%")):
            for name, method in family.magics[kind].items():
                kinds.setdefault((name, family, method), []).append(prefix + name)
    lines = []
    for (_, family, method), forms in sorted(kinds.items(), key=lambda item: item[0][0]):
        lines += ["  ".join(forms), f"    {summary(getattr(family, method))}"]
        actions = getattr(family, method).parser._actions
        lines += [f"    {option(action)}" for action in actions if action.dest != "help"]
    lines.append("control messages of engines")
    lines += [f"    {kind}\n        {summary(answer)}" for kind, answer in sorted(ANSWERS.items())]
    lines.append("messages of views, on the comms of their widgets")
    lines += [f"    {kind}\n        {summary(answer)}" for kind, answer in sorted(QUESTIONS.items())]
    return "\n".join(lines) + "\n"


def test_the_magics_and_their_options_are_these():
    assert current() == LIST.read_text(encoding="utf-8"), __doc__


def test_every_magic_and_option_is_explained():
    for family in FAMILIES:
        for kind in ("line", "cell"):
            for name, method in family.magics[kind].items():
                function = getattr(family, method)
                assert "Example" in (function.__doc__ or ""), f"{name} shows no example"
                assert all(action.help for action in function.parser._actions), f"{name} has a mute option"


if __name__ == "__main__":
    LIST.write_text(current(), encoding="utf-8")
    print(f"Written: {LIST}")
