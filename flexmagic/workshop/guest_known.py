"""What a guest can name, known without asking the gateway each time: for completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flexmagic.layout.names import Names

if TYPE_CHECKING:
    from flexmagic.workshop.guest_hooks import GuestHooks


class GuestKnown:
    """The names of modules and hooks; ``paths`` are those of the model, asked for once."""

    def __init__(self, paths: Callable[[], list[str]], hooks: GuestHooks) -> None:
        self._paths, self._hooks = paths, hooks
        self._names: Names | None = None

    def modules(self, typed: str) -> list[str]:
        """The modules whose names can follow what is typed, up to the next dot."""
        self._names = self._names or Names(self._paths())
        return self._names.below(typed)

    def ports(self, _path: str) -> list[str]:
        """Nothing: what a module's sites are is the gateway's to say."""
        return []

    def parameters(self, _typed: str) -> list[str]:
        """Nothing: weights are the owner's."""
        return []

    def members(self, _path: str, _names: Sequence[str]) -> list[str]:
        """Nothing: guests do not look into the engines' objects."""
        return []

    def card(self, _site: str) -> str | None:
        """Nothing is known without asking."""
        return None

    @property
    def hooks(self) -> list[str]:
        """The hooks' names."""
        return [hook.name for hook in self._hooks]

    @property
    def groups(self) -> list[str]:
        """The groups' names."""
        return [hook.group for hook in self._hooks if hook.group]
