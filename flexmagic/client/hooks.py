"""A hook: named and versioned code for sites of the model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from flexmagic.client.hook_text import cell_of, difference
from flexmagic.engine.code import HookSource
from flexmagic.engine.limits import the_dim
from flexmagic.errors import HookError, InputError, LayoutError, SiteError
from flexmagic.layout.sites import Site, check_paths, resolve
from flexmagic.layout.standard import is_standard

if TYPE_CHECKING:
    from flexmagic.client.aliases import Target
    from flexmagic.client.hook_book import HookBook
    from flexmagic.client.model import Model

REMEMBERED = 1000
"""How many patterns it is remembered of what they name in a model."""


@dataclass(frozen=True)
class HookVersion:
    """One version of a hook: its code, the site patterns it is for, and its group."""

    source: HookSource
    patterns: tuple[Site, ...]
    group: str | None = None

    @functools.cached_property
    def packed(self) -> bytes:
        """The version as it is left with the engines, again and again."""
        import cloudpickle

        raw: bytes = cloudpickle.dumps(replace(self))  # a copy, which has nothing packed in it
        return raw

    @staticmethod
    def unpacked(raw: bytes) -> HookVersion:
        """The version that was packed."""
        import cloudpickle

        version: HookVersion = cloudpickle.loads(raw)
        return version


class Hook:
    """A named hook. Running its cell again makes a new version; :meth:`undo` takes the last one back.

    ``history``: all versions that can be gone back to, the acting one last.
    """

    def __init__(self, book: HookBook, name: str) -> None:
        self._book = book
        self.history: list[HookVersion] = []
        self.name = name
        self.last_error = ""
        self._enabled = True

    @classmethod
    def of(cls, book: HookBook, known: dict[str, Any]) -> Self:
        """The hook that :attr:`known` was read from."""
        hook = cls(book, known["name"])
        hook.history = [HookVersion.unpacked(raw) for raw in known["history"]]
        hook._enabled = known["enabled"]
        return hook

    @property
    def known(self) -> dict[str, Any]:
        """All there is to know of the hook, as plain values and packed versions."""
        history = [version.packed for version in self.history]
        return {"name": self.name, "history": history, "enabled": self._enabled}

    @property
    def enabled(self) -> bool:
        """Whether the hook acts; can be set."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        """Let the hook act, or not."""
        if value != self._enabled:
            self._enabled = value
            self._book.on_change(self.name, self)

    @property
    def current(self) -> HookVersion:
        """The version that acts."""
        return self.history[-1]

    @property
    def version(self) -> int:
        """The number of the version that acts, counted from 1."""
        return self.current.source.version

    @property
    def sites(self) -> list[str]:
        """The site patterns the hook is for."""
        return [str(pattern) for pattern in self.current.patterns]

    @property
    def group(self) -> str | None:
        """The group that the hook is switched with."""
        return self.current.group

    @property
    def state(self) -> str:
        """``enabled`` or ``disabled``."""
        return "enabled" if self.enabled else "disabled"

    def push(self, version: HookVersion) -> None:
        """Make a version the one that acts; the session has sent it to every engine."""
        self.history.append(version)

    def undo(self) -> None:
        """Go back to the version before; raises :class:`HookError` if there is none."""
        if len(self.history) == 1:
            msg = f"hook {self.name!r} has no earlier version. Remove it with %flexhook --remove {self.name}."
            raise HookError(msg)
        self.history.pop()
        self._book.on_change(self.name, self)

    def diff(self) -> str:
        """What changed from the version before to the acting one, as a unified diff of their cells.

        Raises :class:`HookError` if there is no earlier version.
        """
        if len(self.history) == 1:
            msg = f"hook {self.name!r} has one version only: there is nothing to compare it with."
            raise HookError(msg)
        return difference(*self.history[-2:])

    @property
    def cell(self) -> str:
        """The cell that makes the acting version; raises :class:`HookError` for a function's."""
        return cell_of(self.current)

    def remove(self) -> None:
        """Take the hook out of the session, all versions of it."""
        self._book.remove(self.name)

    @property
    def versions(self) -> list[int]:
        """The numbers of all versions that can be gone back to, the acting one last."""
        return [v.source.version for v in self.history]

    def __repr__(self) -> str:
        """Name, version, sites, limits, group and state."""
        limits = str(self.current.source.limits)
        more = [limits] * bool(limits) + ([f"group {self.group}"] if self.group else [])
        return f"<Hook {self.name} v{self.version} on {', '.join([*self.sites, *more])}, {self.state}>"


def exact_sites(model: Model, patterns: Sequence[Site], source: HookSource) -> tuple[Site, ...]:
    """The sites that patterns name in the model's survey.

    Raises :class:`SiteError` for a module that is not there or a nested value of which the pattern
    names no tensor, :class:`LayoutError` for a site whose whole cannot be established or that has no
    dim of rows or tokens where the hook asks for some.
    """
    found: list[Site] = []
    for pattern in patterns:
        if not model.surveyed or (pattern.is_gradient and not model.knows_gradients):
            for own, _ in model.standing_for(pattern):
                if model.surveyed or not is_standard(own.path):
                    check_paths(own, model.names(own))
            continue
        _check_heads(model, pattern, source)
        sites = sites_at(model, pattern)
        if not source.captures_only:
            _check_leaves(pattern, sites)
            _check_dims(model, [site for site in sites if not model.rules[site].refused], source)
        refused = [site for site in sites if model.rules[site].refused]
        if refused and not source.local and not source.captures_only:
            msg = (
                f"{refused[0]} is refused: {model.rules[refused[0]].refused}. "
                "With --local a hook can still run on each rank's own piece."
            )
            raise LayoutError(msg)
        found += [site for site in sites if source.local or not model.rules[site].refused]
    return tuple(dict.fromkeys(found))


def sites_at(model: Model, pattern: Site) -> list[Site]:
    """The surveyed sites that a pattern names; raises :class:`SiteError` if there is none."""
    return list(dict.fromkeys(site for site, _ in targets_at(model, pattern)))


def targets_at(model: Model, pattern: Site) -> list[Target]:
    """The same, each with the heads that are meant of its features."""
    if pattern in model.named:
        return list(model.named[pattern])
    sites: list[Target] = []
    for own, heads in model.standing_for(pattern):
        check_paths(own, model.names(own))
        sites += [(site, heads) for site in resolve(own, model.rules)]
    if not sites:
        msg = f"No tensor was seen at {pattern} in the survey. Type %flexmodel to see the sites."
        raise SiteError(msg)
    if len(model.named) >= REMEMBERED:
        model.named.clear()
    model.named[pattern] = sites
    return list(sites)


def _check_heads(model: Model, pattern: Site, source: HookSource) -> None:
    if source.local and any(heads is not None for _, heads in model.standing_for(pattern)):
        msg = f"{pattern} are the heads of whole features; a --local hook has a rank's own piece."
        raise InputError(msg)


def _check_leaves(pattern: Site, sites: Sequence[Site]) -> None:
    paths = [site.path for site in sites]
    several = [site for site in sites if paths.count(site.path) > 1]
    if several:
        first = [str(s) for s in several if s.path == several[0].path]
        msg = f"{pattern} holds several tensors: {', '.join(first)}. Name one, e.g. {first[0]}"
        raise SiteError(msg)


def _check_dims(model: Model, sites: Sequence[Site], source: HookSource) -> None:
    limits = source.limits
    for option, picks, name in (("row", limits.row, "batch"), ("token", limits.token, "seq")):
        for site in sites if picks is not None else ():
            try:
                the_dim(model.rules[site].dims, name)
            except InputError as error:
                msg = f"{option} {picks} has no meaning at {site}: {error}. Index x in the body instead."
                raise LayoutError(msg) from None
