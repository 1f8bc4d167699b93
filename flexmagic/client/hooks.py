"""The hooks of a session: named, versioned, on all engines or on none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.client.table import Table
from flexmagic.engine.code import HookSource, check, from_function, from_text
from flexmagic.errors import HookError, LayoutError, SiteError
from flexmagic.layout.sites import Site, check_paths, resolve

if TYPE_CHECKING:
    from flexmagic.client.model import Model


@dataclass(frozen=True)
class HookVersion:
    """One version of a hook: its code and the site patterns it is for."""

    source: HookSource
    patterns: tuple[Site, ...]


class Hook:
    """A named hook. Running its cell again makes a new version; :meth:`undo` takes the last one back."""

    def __init__(self, book: HookBook, name: str) -> None:
        self._book = book
        self._history: list[HookVersion] = []
        self.name = name
        self.enabled = True

    @property
    def current(self) -> HookVersion:
        """The version that acts."""
        return self._history[-1]

    @property
    def version(self) -> int:
        """The number of the version that acts, counted from 1."""
        return self.current.source.version

    @property
    def sites(self) -> list[str]:
        """The site patterns the hook is for."""
        return [str(pattern) for pattern in self.current.patterns]

    def push(self, version: HookVersion) -> None:
        """Make a version the one that acts; the session has sent it to every engine."""
        self._history.append(version)

    def undo(self) -> None:
        """Go back to the version before; raises :class:`HookError` if there is none."""
        if len(self._history) == 1:
            msg = f"hook {self.name!r} has no earlier version. Remove it with %flexhook --remove {self.name}."
            raise HookError(msg)
        self._history.pop()

    def remove(self) -> None:
        """Take the hook out of the session, all versions of it."""
        self._book.remove(self.name)

    @property
    def sources(self) -> list[HookSource]:
        """The code of all versions that can be gone back to."""
        return [version.source for version in self._history]

    @property
    def versions(self) -> list[int]:
        """The numbers of all versions that can be gone back to, the acting one last."""
        return [v.source.version for v in self._history]

    def __repr__(self) -> str:
        """Name, version, sites and state."""
        return f"<Hook {self.name} v{self.version} on {', '.join(self.sites)}, {_state(self)}>"


class HookBook:
    """All hooks of a session in the order in which they were first registered."""

    def __init__(
        self, owner: str, send: Callable[[HookSource], None], forget: Callable[[str, int], None]
    ) -> None:
        self._owner = owner
        self._send = send
        self._forget = forget
        self._hooks: dict[str, Hook] = {}
        self._last_version: dict[str, int] = {}

    def register(
        self,
        model: Model,
        sites: Sequence[str],
        code: str | Callable[..., Any],
        *,
        name: str | None,
        local: bool,
        first_line: int = 1,
    ) -> Hook:
        """Check, compile here, send to every engine, and only then let it act.

        Raises :class:`SiteError`, :class:`LayoutError` or :class:`HookError`; the hook's former
        version then stays as it was on every engine.
        """
        patterns = tuple(Site.parse(text) for text in sites)
        if not patterns:
            msg = "A hook needs a site, e.g. %%flexhook model.layers.*.mlp"
            raise SiteError(msg)
        name = name or ", ".join(sites)
        number = self._last_version.get(name, 0) + 1
        if isinstance(code, str):
            source = from_text(name, number, code, first_line, local=local, owner=self._owner)
        else:
            source = from_function(name, number, code, local=local, owner=self._owner)
        check(source)
        exact_sites(model, patterns, source)
        self._send(source)
        self._last_version[name] = number
        hook = self._hooks.get(name) or Hook(self, name)
        hook.push(HookVersion(source, patterns))
        hook.enabled = True
        self._hooks[name] = hook
        return hook

    def remove(self, name: str) -> None:
        """Drop a hook and its versions on the engines; raises :class:`HookError` for an unknown name."""
        hook = self[name]
        for number in hook.versions:
            self._forget(name, number)
        del self._hooks[name], self._last_version[name]

    def __getitem__(self, name: str) -> Hook:
        """The hook of a name; raises :class:`HookError` naming those there are."""
        if name not in self._hooks:
            listed = ", ".join(self._hooks) or "none yet"
            msg = f"There is no hook {name!r}. Hooks: {listed}."
            raise HookError(msg)
        return self._hooks[name]

    def __iter__(self) -> Iterator[Hook]:
        """The hooks in order."""
        return iter(self._hooks.values())

    def __len__(self) -> int:
        """The number of hooks."""
        return len(self._hooks)

    def sources(self) -> list[HookSource]:
        """All versions of all hooks, as the engines have them."""
        return [source for hook in self for source in hook.sources]

    @property
    def enabled(self) -> list[Hook]:
        """The hooks that act in the next run."""
        return [hook for hook in self if hook.enabled]

    def table(self) -> Table:
        """Name, version, sites, what it does and state of every hook."""
        rows = tuple(
            (h.name, f"v{h.version}", ", ".join(h.sites), _does(h.current.source), _state(h)) for h in self
        )
        return Table(("hook", "version", "sites", "does", "state"), rows, "" if rows else "No hooks yet.")

    def __repr__(self) -> str:
        """The table as text."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _state(hook: Hook) -> str:
    return "enabled" if hook.enabled else "disabled"


def _does(source: HookSource) -> str:
    if source.captures_only:
        return "captures"
    return "runs on each rank's own piece" if source.local else "runs on the whole tensor"


def exact_sites(model: Model, patterns: Sequence[Site], source: HookSource) -> tuple[Site, ...]:
    """The sites that patterns name in the model's survey.

    Raises :class:`SiteError` for a module that is not there or a nested value of which the pattern
    names no tensor, :class:`LayoutError` for a site whose whole cannot be established.
    """
    found: list[Site] = []
    for pattern in patterns:
        if not model.surveyed or (pattern.is_gradient and not model.knows_gradients):
            check_paths(pattern, model.names(pattern))
            continue
        sites = sites_at(model, pattern)
        if not source.captures_only:
            _check_leaves(pattern, sites)
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
    check_paths(pattern, model.names(pattern))
    sites = resolve(pattern, model.rules)
    if not sites:
        msg = f"No tensor was seen at {pattern} in the survey. Type %flexmodel to see the sites."
        raise SiteError(msg)
    return sites


def _check_leaves(pattern: Site, sites: Sequence[Site]) -> None:
    paths = [site.path for site in sites]
    several = [site for site in sites if paths.count(site.path) > 1]
    if several:
        first = [str(s) for s in several if s.path == several[0].path]
        msg = f"{pattern} holds several tensors: {', '.join(first)}. Name one, e.g. {first[0]}"
        raise SiteError(msg)
