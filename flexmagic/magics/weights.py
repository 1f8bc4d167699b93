"""``%%flexweights`` and ``%flexweights``: parameters edited in place, and put back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import line_cell_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import InputError
from flexmagic.magics.arguments import parse, sites
from flexmagic.magics.desk import DeskMagics

if TYPE_CHECKING:
    from flexmagic.client.table import Table
    from flexmagic.client.weights import WeightEdited


@magics_class
class WeightsMagics(DeskMagics):
    """Parameters of the model, whole."""

    @magic_arguments()
    @argument("parameters", nargs="*", help="names or patterns: model.layers.{1..2}.mlp.down_proj.weight")
    @argument("--seed", type=int, default=0, help="fixes random draws, whatever the number of ranks")
    @argument("--undo", action="store_true", help="take the last edit back, bit for bit")
    @argument("--restore", action="store_true", help="take all edits back")
    @no_var_expand
    @line_cell_magic
    def flexweights(self, line: str, cell: str | None = None) -> WeightEdited | Table | None:
        """Edit parameters in place on every rank, or list the edits and take them back.

        The cell's body is run for each parameter: ``x`` is the whole of it, whatever holds it in parts;
        change it in place, assign it or return it. ``site`` is its name, ``index`` its layer. The edit
        stays until it is undone, or the model is let go of. Examples::

            %%flexweights model.layers.1.mlp.down_proj.weight
            x[:, 300] = 0

            %flexweights            (the list)
            %flexweights --undo
        """
        args = parse(self.flexweights, line)
        if args is None:
            return None
        model = self._desk.session.model
        if cell is not None:
            if not args.parameters:
                msg = "Name what is edited: %%flexweights model.layers.1.mlp.down_proj.weight"
                raise InputError(msg)
            return model.edit(sites(args.parameters), cell, seed=args.seed, first_line=2)
        if args.parameters:
            msg = "An edit is a cell: type %%flexweights and the names, and below it what becomes of x."
            raise InputError(msg)
        if args.undo:
            model.undo()
        if args.restore:
            model.restore()
        return model.edits
