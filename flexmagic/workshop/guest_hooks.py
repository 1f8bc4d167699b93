"""The hooks of a guest, which live with the gateway; a list of them here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.client.table import Table
from flexmagic.errors import HookError

if TYPE_CHECKING:
    from flexmagic.workshop.link import Link


@dataclass(frozen=True)
class GuestHook:
    """A guest's hook by name; ``text`` is what the gateway says of it."""

    hooks: GuestHooks
    name: str
    group: str | None = None
    enabled: bool = True
    text: str = ""

    def undo(self) -> None:
        """Go back to the version before; raises :class:`HookError` if there is none."""
        self.hooks.switch("undo", self.name)

    def remove(self) -> None:
        """Take the hook out, all versions of it."""
        self.hooks.switch("remove", self.name)

    def __repr__(self) -> str:
        """What the gateway says of it."""
        return self.text or f"<Hook {self.name}>"


class GuestHooks:
    """All hooks of a guest in the order in which they were first registered."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def switch(self, action: str, *names: str) -> dict[str, Any]:
        """Have the gateway do something to hooks by name; raises what it refuses with."""
        return self._link.ask("switch", once=action == "undo", action=action, names=list(names))[0]

    def enable(self, *names: str) -> None:
        """Let hooks or groups act, all of them without a name."""
        self.switch("enable", *names)

    def disable(self, *names: str) -> None:
        """Keep hooks or groups but do not let them act, none of them without a name."""
        self.switch("disable", *names)

    def complement(self, *names: str) -> None:
        """Let every hook act but those of these names or groups."""
        self.switch("complement", *names)

    def _said(self) -> dict[str, Any]:
        return self._link.ask("hooks")[0]

    def named(self, names: str | Sequence[str]) -> list[GuestHook]:
        """The hooks that have one of these names or are in a group of one; ``*`` is all.

        Raises :class:`HookError` for a name that is neither.
        """
        wanted, found = [names] if isinstance(names, str) else list(names), list(self)
        known = {"*", *(hook.name for hook in found), *(hook.group for hook in found)}
        if unknown := [name for name in wanted if name not in known]:
            raise HookError(f"There is no hook {unknown[0]!r} and no group of that name.")
        return [h for h in found if "*" in wanted or h.name in wanted or h.group in wanted]

    def __getitem__(self, name: str) -> GuestHook:
        """The hook of a name; raises :class:`HookError`."""
        found = next((hook for hook in self if hook.name == name), None)
        if found is None:
            raise HookError(f"There is no hook {name!r}.")
        return found

    @property
    def enabled(self) -> list[GuestHook]:
        """The hooks that act in the next run."""
        return [hook for hook in self if hook.enabled]

    def __iter__(self) -> Iterator[GuestHook]:
        """The hooks in order."""
        return iter([GuestHook(self, h["name"], h["group"], h["enabled"]) for h in self._said()["hooks"]])

    def __len__(self) -> int:
        """The number of hooks."""
        return len(self._said()["hooks"])

    def table(self) -> Table:
        """Name, version, sites, what it does and state of every hook."""
        return table_of(self._said())

    def __repr__(self) -> str:
        """The table as text."""
        return str(self.table())


def table_of(said: dict[str, Any]) -> Table:
    """A table as the gateway sends one."""
    return Table(tuple(said["columns"]), tuple(tuple(row) for row in said["rows"]), said.get("title", ""))
