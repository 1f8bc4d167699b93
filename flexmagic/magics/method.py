"""What magics of methods share: a recipe waited for, and tokens by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from flexmagic.errors import InputError
from flexmagic.magics.arguments import unquoted
from flexmagic.magics.desk import DeskMagics, waiting
from flexmagic.magics.inputs import value_of

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

Made = TypeVar("Made")


class MethodMagics(DeskMagics):
    """A family of magics that call recipes."""

    def _done(self, what: str, do: Callable[[Any], Made]) -> Made:
        """What a recipe gives, waited for with a line that says how long it takes, and a button."""
        cancel = self._desk.session.cancel
        with waiting(self._desk.shell, what, quiet=1.0, cancel=cancel) as status:
            made = do(status.tick)
            status.done(what)
        return made

    def _values(self, args: Namespace, *names: str) -> dict[str, Any]:
        """The values of options that are expressions of the notebook; of those that were given."""
        given = {name: getattr(args, name) for name in names}
        return {
            name: value_of(self.shell, f"--{name}", text) for name, text in given.items() if text is not None
        }


def named_tokens(words: list[str]) -> dict[str, str | int]:
    """Names and the tokens that they mean; raises :class:`InputError` for a word without a name."""
    out: dict[str, str | int] = {}
    for word in map(unquoted, words):
        name, equals, text = word.partition("=")
        if not equals:
            raise InputError(f'--tokens {word}: write a name and a token, in quotes: "right= Mary".')
        out[name] = unquoted(text)
    return out
