"""Values that persist over runs: hooks find them on every rank as ``persistent``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexmagic.client.calls import Calls


class Persistent(MutableMapping[str, Any]):
    """A dict on the engines that hooks read and write in any run, and the notebook too.

    Every rank has its own copy, which whole-tensor hooks fill alike. Read here, it is rank 0's; what
    only ranks of other pipeline stages have, is theirs.
    """

    def __init__(self, calls: Calls, owner: Callable[[], str]) -> None:
        self._calls = calls
        self._owner = owner

    def _names(self) -> list[str]:
        of_ranks = self._calls.all("persistent_names", self._owner())
        return list(dict.fromkeys(name for names in of_ranks for name in names))

    def __getitem__(self, name: str) -> Any:
        """A value; raises :class:`KeyError` for an unknown name."""
        found: dict[str, Any] = {}
        for of_rank in reversed(self._calls.all("get_persistent", self._owner(), name)):
            found |= of_rank
        return found[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is a value of a name; fetches none."""
        return name in self._names()

    def __setitem__(self, name: str, value: Any) -> None:
        """Have every rank keep a value."""
        self._calls.all("set_persistent", self._owner(), name, value)

    def __delitem__(self, name: str) -> None:
        """Have every rank forget a value; raises :class:`KeyError` for an unknown name."""
        if name not in self:
            raise KeyError(name)
        self._calls.all("drop_persistent", self._owner(), name)

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._names())

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names())

    def __repr__(self) -> str:
        """The names; fetches no value."""
        return f"<Persistent values of {self._calls.world_size} ranks>"
