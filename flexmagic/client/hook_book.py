"""The hooks of a session, on all engines or on none, and which of them act."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmagic.client import hook_file
from flexmagic.client.hooks import Hook, HookVersion, exact_sites
from flexmagic.client.table import Table
from flexmagic.engine.code import HookSource, check, from_function, from_text
from flexmagic.engine.declared import declares
from flexmagic.engine.limits import Limits
from flexmagic.errors import FlexError, HookError, InputError, SiteError
from flexmagic.layout.patterns import listed
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.client.model import Model

Names = str | Sequence[str]
"""Hooks and groups by name; ``*`` is all hooks."""


VERSIONS = 1000
"""How many versions of a hook can be gone back to."""


class HookBook:
    """All hooks of a session in the order in which they were first registered.

    ``boxed``: whether their code is somebody's whom the engines do not trust; it then runs walled in, see
    :mod:`flexmagic.engine.box`. ``versions``: how many of a hook are kept, the acting one included.
    """

    def __init__(
        self,
        owner: str,
        send: Callable[[HookSource], None],
        forget: Callable[[str, int], None],
        model: Callable[[], Model],
    ) -> None:
        self.owner = owner
        self.boxed = False
        self.versions = VERSIONS
        self._send = send
        self._forget = forget
        self._model = model
        self._hooks: dict[str, Hook] = {}
        self._last_version: dict[str, int] = {}
        self.on_change: Callable[[str, Hook | None], None] = lambda _name, _hook: None

    def register(
        self,
        model: Model,
        sites: str | Sequence[str],
        code: str | Callable[..., Any],
        *,
        name: str | None,
        local: bool = False,
        limits: Limits | None = None,
        group: str | None = None,
        first_line: int = 1,
        text: str | None = None,
    ) -> Hook:
        """Check, compile here, send to every engine, and only then let it act.

        ``text``: the source of a function, where it does not know it itself.

        Raises :class:`SiteError`, :class:`LayoutError` or :class:`HookError`; the hook's former
        version then stays as it was on every engine.
        """
        sites = listed(sites)
        patterns = tuple(Site.parse(text) for text in sites)
        if not patterns:
            msg = "A hook needs a site, e.g. %%flexhook model.layers.*.mlp"
            raise SiteError(msg)
        name = name or ", ".join(sites)
        self._check_names(name, group)
        number = self._last_version.get(name, 0) + 1
        if isinstance(code, str):
            source = from_text(name, number, code, first_line, local=local, owner=self.owner)
        else:
            source = from_function(name, number, code, local=local, owner=self.owner)
        source = replace(
            source,
            limits=limits or Limits(),
            text=source.text if text is None else text,
            boxed=self.boxed and not source.captures_only and not declares(source),
        )
        check(source)
        _check_limits(source)
        exact_sites(model, patterns, source)
        self._send(source)
        self._last_version[name] = number
        hook = self._hooks.get(name) or Hook(self, name)
        hook.push(HookVersion(source, patterns, group))
        for old in hook.history[: -self.versions]:
            self._forget(name, old.source.version)
        del hook.history[: -self.versions]
        hook.enabled = True
        self._hooks[name] = hook
        self.on_change(name, hook)
        return hook

    def receive(self, known: dict[str, Any], model: Model | None = None) -> None:
        """Take over a hook of an earlier notebook, as :attr:`Hook.known` has it; the engines have it already.

        With a ``model``, another session's: its acting version becomes a hook of one's own, unless the
        name is taken.
        """
        if model is None:
            hook = Hook.of(self, known)
            self._hooks[hook.name], self._last_version[hook.name] = hook, max(hook.versions)
        elif known["name"] not in self._hooks:
            version = HookVersion.unpacked(known["history"][-1])
            source = version.source
            self.register(
                model, [str(pattern) for pattern in version.patterns], source.function or source.text,
                name=known["name"], local=source.local, limits=source.limits, group=version.group,
                first_line=source.first_line, text=source.text,
            )  # fmt: skip

    def remove(self, name: str) -> None:
        """Drop a hook and its versions on the engines; raises :class:`HookError` for an unknown name."""
        hook = self[name]
        for number in hook.versions:
            self._forget(name, number)
        del self._hooks[name], self._last_version[name]
        self.on_change(name, None)

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

    @property
    def enabled(self) -> list[Hook]:
        """The hooks that act in the next run."""
        return [hook for hook in self if hook.enabled]

    @property
    def groups(self) -> dict[str, list[Hook]]:
        """The hooks of each group."""
        found: dict[str, list[Hook]] = {}
        for hook in self:
            if hook.group is not None:
                found.setdefault(hook.group, []).append(hook)
        return found

    def named(self, names: Names) -> list[Hook]:
        """The hooks that have one of these names or are in a group of one, in order; ``*`` is all.

        Raises :class:`HookError` for a name that is neither a hook's nor a group's.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        unknown = [n for n in wanted if n != "*" and n not in self._hooks and n not in self.groups]
        if unknown:
            hooks, groups = ", ".join(self._hooks) or "none yet", ", ".join(self.groups) or "none yet"
            said = ", ".join(map(repr, unknown))
            raise HookError(
                f"There is no hook {said} and no group of that name. Hooks: {hooks}. Groups: {groups}."
            )
        return [hook for hook in self if "*" in wanted or hook.name in wanted or hook.group in wanted]

    def enable(self, *names: str) -> None:
        """Let hooks or groups act, all of them without a name; raises as :meth:`named` does."""
        self._switch(names, enabled=True)

    def disable(self, *names: str) -> None:
        """Keep hooks or groups but do not let them act, none of them without a name."""
        self._switch(names, enabled=False)

    def _switch(self, names: Names, *, enabled: bool) -> None:
        for hook in self.named(names or "*"):
            hook.enabled = enabled

    def complement(self, *names: str) -> None:
        """Let every hook act but those of these names or groups; raises as :meth:`named` does."""
        without = self.named(names)
        for hook in self:
            hook.enabled = hook not in without

    def acting(self, only: Names | None = None, without: Names | None = None) -> list[Hook]:
        """The hooks of one run: the enabled ones, or ``only`` some, and none of ``without``."""
        hooks = self.enabled if only is None else self.named(only)
        left_out = self.named(without or ())
        return [hook for hook in hooks if hook not in left_out]

    @contextlib.contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """Let only these hooks or groups act, for the length of a ``with`` block."""
        wanted = self.named(names)
        before = {hook: hook.enabled for hook in self}
        for hook in self:
            hook.enabled = hook in wanted
        try:
            yield
        finally:
            for hook, enabled in before.items():
                hook.enabled = enabled

    def _check_names(self, name: str, group: str | None) -> None:
        """Raise :class:`HookError` where a name would mean a hook and a group."""
        taken = self.groups.keys() - ({self._hooks[name].group} if name in self._hooks else set())
        if name == "*" or group == "*":
            raise HookError("* means all hooks and can be no name.")
        if name in taken or name == group or (group in self._hooks and group != name):
            raise HookError(
                f"{group if group in self._hooks else name!r} is the name of a hook and of a group."
            )

    def table(self) -> Table:
        """Name, version, sites, what it does and state of every hook."""
        rows = tuple(
            (
                h.name,
                f"v{h.version}",
                ", ".join(h.sites),
                str(h.current.source.limits),
                _does(h.current.source),
                h.group or "",
                h.state,
            )
            for h in self
        )
        return Table(
            ("hook", "version", "sites", "only at", "does", "group", "state"),
            rows,
            "" if rows else "No hooks yet.",
        )

    def export(self, path: str | Path, *names: str) -> Path:
        """Write hooks, by name or group, or all of them, to a text file; see :mod:`hook_file`.

        Raises :class:`HookError` for a function whose source does not stand for itself, and
        :class:`InputError` for a file that cannot be written.
        """
        hooks = self.named(names or "*")
        return hook_file.write(path, [hook_file.entry_of(hook.current, hook.enabled) for hook in hooks])

    def load(self, path: str | Path) -> list[Hook]:
        """Register the hooks of a file, all of them or none; hooks of the same names are replaced.

        Raises :class:`InputError` for what is no hook file, and what :meth:`register` raises.
        """
        entries = hook_file.read(path)
        model, before, made = self._model(), {hook: hook.enabled for hook in self}, list[Hook]()
        try:
            made.extend(self._register_entry(model, entry) for entry in entries)
        except FlexError:
            for hook in reversed(made):
                hook.undo() if hook in before else hook.remove()
                hook.enabled = before.get(hook, True)
            raise
        for hook, entry in zip(made, entries, strict=True):
            hook.enabled = entry.enabled
        return made

    def _register_entry(self, model: Model, entry: hook_file.Entry) -> Hook:
        code, text = (entry.code, None) if not entry.function else (entry.made(), entry.code)
        return self.register(
            model, entry.sites, code, name=entry.name, local=entry.local, limits=entry.limits,
            group=entry.group, first_line=2, text=text,
        )  # fmt: skip

    def __repr__(self) -> str:
        """The table as text."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _does(source: HookSource) -> str:
    if source.captures_only:
        return "captures"
    return "runs on each rank's own piece" if source.local else "runs on the whole tensor"


def _check_limits(source: HookSource) -> None:
    """Raise :class:`InputError` for limits that a hook of this kind cannot have."""
    if source.captures_only and source.limits.when:
        raise InputError("A hook without a body captures in any case: leave --when away.")
    if source.limits.whole:
        return
    if source.local:
        raise InputError(
            "Rows and tokens are those of the whole tensor; a --local hook has a rank's own piece."
        )
    if source.captures_only:
        raise InputError("A hook without a body captures whole tensors: leave --row and --token away.")
