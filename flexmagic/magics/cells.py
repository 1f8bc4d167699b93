"""``%flexcells``: whether plain cells run in the notebook or on the engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.client.cell_run import ByRank
from flexmagic.errors import InputError
from flexmagic.magics.arguments import parse
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.status_line import waiting

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.magics.desk import Desk

ENGINES, NOTEBOOK, TYPED = "engines", "notebook", "typed"
"""Where cells run; and how a cell is marked that was typed without a magic above it."""


def to_engines(lines: list[str]) -> list[str]:
    """A plain cell as one that runs on the engines; one with magics, shell commands or questions stays."""
    stripped = [line.strip() for line in lines if line.strip()]
    if not stripped or any(line[0] in "%!?" or line[-1] == "?" for line in stripped):
        return lines
    return [f"get_ipython().run_cell_magic('flexcells', {TYPED!r}, {''.join(lines)!r})\n"]


class EngineCells:
    """The transformation of plain cells while they run on the engines."""

    def __init__(self, shell: InteractiveShell, desk: Desk) -> None:
        self._transforms = shell.input_transformers_cleanup
        desk.cells = self

    def add(self) -> None:
        """Nothing yet: cells run in the notebook until they are asked to run elsewhere."""

    def remove(self) -> None:
        """Let cells run in the notebook."""
        if self.on:
            self._transforms.remove(to_engines)

    @property
    def on(self) -> bool:
        """Whether plain cells run on the engines."""
        return to_engines in self._transforms

    def switch_on(self) -> None:
        """Let cells run on the engines."""
        if not self.on:
            self._transforms.append(to_engines)


@magics_class
class CellsMagics(DeskMagics):
    """Where plain cells run."""

    @magic_arguments()
    @argument("where", nargs="?", help="engines or notebook; without: say where they run now")
    @line_cell_magic
    def flexcells(self, line: str, cell: str | None = None) -> Any:
        """Run plain cells on every engine from now on, or in the notebook again; or one cell there.

        On the engines a cell has ``model``, ``tokenizer`` and what ``%%px`` defines; hooks act in its
        forwards. Its last value and what it prints are shown once if all ranks have the same, else by rank.
        The notebook's variables are neither seen nor changed. Cells with magics run in the notebook.
        Examples::

            %flexcells engines
            sum(p.numel() for p in model.parameters())

            %flexcells notebook

            %%flexcells
            model.training
        """
        if cell is not None:
            return self._run(cell, first_line=1 if line == TYPED else 2)
        args = parse(self.flexcells, line)
        if args is None:
            return None
        cells = self._desk.cells
        if args.where == ENGINES:
            _ = self._desk.session.model  # without one, that is what to say first
            cells.switch_on()
        elif args.where == NOTEBOOK:
            cells.remove()
        elif args.where is not None:
            msg = f"%flexcells knows no {args.where!r}: cells run on the {ENGINES} or in the {NOTEBOOK}."
            raise InputError(msg)
        print(f"Plain cells run {'on the engines' if cells.on else 'in the notebook'}.")
        return None

    def _run(self, cell: str, first_line: int) -> Any:
        cancel = self._desk.session.cancel
        with waiting(self._desk.shell, "Running", quiet=1.0, cancel=cancel) as status:
            made = self._desk.session.run_cell(cell, progress=status.tick, first_line=first_line)
        if isinstance(made.value, ByRank) and hasattr(self._desk.shell, "kernel"):
            from flexmagic.view.rank_tabs import show

            show(made.value)
            return None
        return made.value
