"""What can be named in a session, known without asking any engine, and what its names have inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from flexmagic.client.site_card import site_card
from flexmagic.layout.names import Names
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.client.calls import Calls
    from flexmagic.client.hook_book import HookBook
    from flexmagic.client.model import Model

PATIENCE = 0.15
"""Seconds that an engine has to say what a name has inside; who types does not wait longer."""


class Known:
    """The names of a session's modules, sites, parameters, hooks and groups."""

    def __init__(
        self, calls: Calls, owner: Callable[[], str], hooks: HookBook, model: Callable[[], Model | None]
    ) -> None:
        self._calls = calls
        self._owner = owner
        self._hooks = hooks
        self._model = model
        self._trees: dict[str, tuple[tuple[Model, int], Names]] = {}

    def modules(self, typed: str) -> list[str]:
        """The modules whose names can follow what is typed, up to the next dot; standard names too."""
        return self._below("modules", typed)

    def parameters(self, typed: str) -> list[str]:
        """The same of parameters."""
        return self._below("parameters", typed)

    def ports(self, path: str) -> list[str]:
        """The surveyed sites of a module, or of the first that a pattern names: port and element."""
        model = self._model()
        if model is None:
            return []
        first = next(self._paths(path), path)
        own = [site for site in model.rules if site.path == first]
        found = (site for port in ("output", "input") for site in own if site.port == port)
        return list(dict.fromkeys(f"{site.port}{site.leaf}" for site in found))

    @property
    def hooks(self) -> list[str]:
        """The hooks' names."""
        return [hook.name for hook in self._hooks]

    @property
    def groups(self) -> list[str]:
        """The groups' names."""
        return list(self._hooks.groups)

    def card(self, site: str) -> str | None:
        """What is known of a site, as text; ``None`` for a name that means nothing here."""
        model = self._model()
        return None if model is None or not model.alive else site_card(model, self._hooks, site)

    def members(self, path: str, names: Sequence[str]) -> list[str]:
        """What can follow a dotted name in a hook at a module; nothing if no engine says it at once.

        ``path`` may be a pattern; ``names``: the parts of the dotted name, none for the engines' namespace.
        """
        ranks = self._calls.ranks
        first = next(self._paths(path), path)
        return ranks.control.members(ranks.alive(), self._owner(), first, names, PATIENCE) or []

    def _paths(self, pattern: str) -> Iterator[str]:
        model, meant = self._model(), Site(pattern)
        return (path for path in (model.paths if model else ()) if meant.matches(Site(path)))

    def _below(self, kind: str, typed: str) -> list[str]:
        model = self._model()
        if model is None or not model.alive:
            return []
        known = (model, len(model.standard))
        if kind not in self._trees or self._trees[kind][0] != known:
            names = [*model.paths, *model.standard] if kind == "modules" else model.names(Site("", "grad"))
            self._trees[kind] = known, Names(names)
        return self._trees[kind][1].below(typed)
