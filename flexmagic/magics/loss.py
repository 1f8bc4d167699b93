"""``%%flexloss``: a named loss to differentiate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import InputError
from flexmagic.magics.arguments import parse, unquoted
from flexmagic.magics.desk import DeskMagics

if TYPE_CHECKING:
    from flexmagic.client.table import Table


@magics_class
class LossMagics(DeskMagics):
    """Losses for ``--backward``."""

    @magic_arguments()
    @argument("name", nargs="?", help="the loss's name; the same name replaces")
    @line_cell_magic
    def flexloss(self, line: str, cell: str | None = None) -> Table | None:
        """Keep a loss under a name, or list those there are.

        The cell sees ``logits``, ``output`` and ``ids`` of the whole batch and the engines' namespace;
        its last line is the loss, one number. Example::

            %%flexloss gap
            last = logits[:, -1].log_softmax(-1)
            (last[:, 5] - last[:, 7]).sum()

            run = %flexrun "Paris is" --backward gap --capture model.layers.1:grad_output
        """
        args = parse(self.flexloss, line)
        if args is None:
            return None
        losses = self._desk.session.losses
        if cell is None and args.name:
            raise InputError("Write the loss in a cell below %%flexloss NAME; %flexloss alone lists them.")
        if cell is None:
            return losses.table()
        if not args.name:
            raise InputError("Give the loss a name: %%flexloss gap")
        losses.register(unquoted(args.name), cell, first_line=2)
        return None
