"""What the owner of a workshop does with all guests: offer a hook, show a tensor, collect a number."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from flexmagic.client.activation import Activation
from flexmagic.client.masking import MaskedActivation
from flexmagic.errors import InputError
from flexmagic.workshop.collecting import Collected, check, collect
from flexmagic.workshop.fields import NAME, TEXT
from flexmagic.workshop.notices import Board, Notice

if TYPE_CHECKING:
    from flexmagic.client.calls import Calls
    from flexmagic.workshop.guests import Guest
    from flexmagic.workshop.journal import Journal

_HOOK = re.compile(r"%%?flexhook[ \t]+(?P<line>[^\n]*)(?:\n(?P<body>.*))?", re.DOTALL)

TOLD = "The owner may collect statistics of what you captured last, and offer hooks: nothing runs by itself."
"""What every guest is told at joining."""


@runtime_checkable
class Written(Protocol):
    """A hook that has a text."""

    name: str

    @property
    def cell(self) -> str:
        """The cell that makes it; raises :class:`HookError` if there is none."""


class Lesson:
    """What all guests are told, and asked for. ``code``: whether guests' hooks may have some."""

    def __init__(
        self,
        board: Board,
        guests: Iterable[Guest],
        journal: Journal,
        calls: Calls,
        *,
        errand: Callable[[Callable[[], object]], Future[None]],
        code: Callable[[], bool],
    ) -> None:
        self.board = board
        self._guests, self._journal, self._calls = guests, journal, calls
        self._errand, self._code = errand, code

    def send(self, hook: Written | str) -> Notice:
        """Offer a hook's cell to all guests, who take it as their own if they want to; nothing is registered.

        ``hook``: one of a session, or the text of a ``%%flexhook`` cell. Raises :class:`InputError` for
        what no guest could register, :class:`HookError` for a hook without a text.
        """
        cell = (hook if isinstance(hook, str) else hook.cell).strip("\n")
        name = self._checked(cell) if isinstance(hook, str) else (self._checked(cell) and hook.name)
        self._journal.note("owner", "send", hook=name)
        return self.board.put("hook", name, f"The owner offers the hook {name}.", cell)

    def _checked(self, cell: str) -> str:
        """The name of the hook that a cell makes."""
        found = _HOOK.match(cell)
        if found is None:
            raise InputError("What is sent to guests is a hook: its cell begins with %%flexhook SITE.")
        if len(cell) > TEXT:
            raise InputError(f"A hook that is sent has at most {TEXT:,} characters.")
        try:
            words = shlex.split(found["line"], posix=True)
        except ValueError as error:
            raise InputError(f"%%flexhook {found['line']}: {error}.") from None
        if wrong := [word for word in words if word.partition("=")[0] in {"--local", "--when"}]:
            raise InputError(f"{wrong[0]} is not for guests: such hooks run in the engines.")
        if (found["body"] or "").strip() and not self._code():
            raise InputError("Hooks with code are off in this workshop: send one without (--do).")
        return _name(words)

    def show(self, activation: object) -> Notice:
        """Let all guests look at a captured tensor of the owner's, read-only and within their limits.

        Nothing travels until a guest looks. Raises :class:`InputError` for what is no captured tensor,
        or lies on an engine that has ended.
        """
        if not isinstance(activation, Activation):
            kind = type(activation).__name__
            raise InputError(f"What is shown to guests is captured, such as run[site]; this is a {kind}.")
        if isinstance(activation, MaskedActivation):
            raise InputError("Guests see no masks: show the activation as it was captured.")
        if missing := activation.info.missing_ranks:
            raise InputError(
                f"Rank {', '.join(map(str, missing))} has ended: a part of it is gone. Run again."
            )
        view = activation.over(self._calls)
        info = view.info
        said = f"The owner shows {info.site}, {list(info.shape)}{f', {info.hook}' if info.hook else ''}."
        self._journal.note("owner", "show", site=info.site, shape=list(info.shape))
        return self.board.put("view", info.site, said, view=view)

    def collect(self, site: str, stat: str = "mean") -> Collected:
        """One statistic of what the last run of each guest has at a site, by guest; guests are told.

        ``stat``: of :data:`~flexmagic.workshop.collecting.STATS`. Waits for what runs now. Raises
        :class:`InputError` for no statistic.
        """
        check(stat)
        found: list[Collected] = []
        self._errand(lambda: found.append(collect(self._guests, site, stat))).result()
        self._journal.note("owner", "collect", site=site, stat=stat, guests=list(found[0].values))
        if found[0].values:
            self.board.put("collect", site, f"The owner collected the {stat} of {site} of all last runs.")
        return found[0]


def _name(words: list[str]) -> str:
    """The name that a hook has by the words of its line: the one that is given, else its sites."""
    for at, word in enumerate(words):
        if word.startswith("--name="):
            return word.partition("=")[2][:NAME]
        if word == "--name" and at + 1 < len(words):
            return words[at + 1][:NAME]
    sites = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if not sites:
        raise InputError("What is sent to guests is a hook at a site: %%flexhook SITE --name NAME.")
    return " ".join(sites)[:NAME]
