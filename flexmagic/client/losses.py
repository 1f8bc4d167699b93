"""Named losses: cells whose last expression is differentiated."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flexmagic.client.table import Table
from flexmagic.errors import InputError

if TYPE_CHECKING:
    from flexmagic.engine.loss import LossSource


class Losses:
    """A session's losses by name: ``session.losses.register("gap", text)``, then ``backward="gap"``."""

    def __init__(self) -> None:
        self._losses: dict[str, LossSource] = {}

    def register(self, name: str, text: str, *, first_line: int = 1) -> None:
        """Keep a cell over ``logits``, ``output`` and ``ids`` that ends in one number; a name again replaces.

        Raises :class:`CellError` for code that does not compile, :class:`InputError` for a cell or name
        that cannot be used.
        """
        from flexmagic.client.scripts import cell_source
        from flexmagic.engine.loss import LossSource

        if not name.isidentifier() or name in {"logits", "output", "ids"}:
            raise InputError(f"{name!r} is no name for a loss: it needs a free name, such as gap.")
        cell = cell_source(text, first_line)
        body = ast.parse(cell.text).body
        if not body or not isinstance(body[-1], ast.Expr):
            raise InputError(
                "The cell gives no loss: its last line must be one, such as logits[:, -1, 5].sum()"
            )
        self._losses[name] = LossSource(cell=cell)

    def meant(
        self, backward: str | Callable[[Any], Any] | LossSource | None
    ) -> str | Callable[[Any], Any] | LossSource | None:
        """The loss of a name, or what was given where that is no name of one."""
        return self._losses.get(backward.strip(), backward) if isinstance(backward, str) else backward

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._losses)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._losses)

    def table(self) -> Table:
        """Each loss with its code."""
        rows = tuple(
            (name, loss.cell.text.strip() if loss.cell else "") for name, loss in self._losses.items()
        )
        return Table(("loss", "code"), rows, "" if rows else "No losses yet.")

    def __repr__(self) -> str:
        """The table as text."""
        return str(self.table())
