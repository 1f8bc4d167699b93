"""Bytes that sessions leave with a rank, by owner and name; the rank never looks into them."""

from __future__ import annotations


class Kept:
    """Values by owner and name."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, bytes]] = {}

    def keep(self, owner: str, name: str, value: bytes | None) -> None:
        """Keep a value; ``None`` drops it, and with its last value the owner."""
        values = self._values.setdefault(owner, {})
        values.pop(name, None)
        if value is not None:
            values[name] = value
        if not values:
            del self._values[owner]

    def get(self, owner: str, name: str) -> bytes | None:
        """A value, ``None`` if there is none."""
        return self._values.get(owner, {}).get(name)

    def names(self, owner: str) -> list[str]:
        """The names of an owner's values, oldest first."""
        return list(self._values.get(owner, {}))

    def all(self, owner: str) -> dict[str, bytes]:
        """An owner's values by name, oldest first."""
        return dict(self._values.get(owner, {}))

    def owners(self) -> list[str]:
        """All owners, in the order in which they came."""
        return list(self._values)
