"""``%px`` in a guest's notebook: the engines are the owner's, and that is said in a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from flexmagic.errors import ClusterError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.magics.desk import Desk

NAMES = ("px", "autopx", "pxconfig", "pxresult")
"""ipyparallel's magics, which speak to the engines directly."""


class OwnersMagics:
    """Refusals in place of magics that reach the engines, for as long as the notebook is a guest."""

    def __init__(self, shell: InteractiveShell, desk: Desk) -> None:
        self._magics = shell.magics_manager.magics
        self._before: dict[tuple[str, str], Any] | None = None
        desk.owners = self

    def add(self) -> None:
        """Nothing yet: a notebook is nobody's guest at first."""

    def refuse(self) -> None:
        """Refuse from now on."""
        if self._before is None:
            places = [(kind, name) for kind in ("line", "cell") for name in NAMES]
            self._before = {(kind, name): self._magics[kind].get(name) for kind, name in places}
            for kind, name in places:
                self._magics[kind][name] = _refuse

    def remove(self) -> None:
        """Put back what was there."""
        for (kind, name), magic in (self._before or {}).items():
            if magic is None:
                self._magics[kind].pop(name, None)
            else:
                self._magics[kind][name] = magic
        self._before = None


def _refuse(*_args: Any) -> NoReturn:
    raise ClusterError(
        "The engines are the owner's in a workshop: %px does not reach them. "
        "As a guest you have %flexhook, %flexrun and what a run returns."
    )
