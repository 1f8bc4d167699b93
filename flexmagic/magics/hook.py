"""``%%flexhook`` and ``%flexhook``: code at sites of the model, and the list of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import line_cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.magics.arguments import parse, sites, unquoted
from flexmagic.magics.desk import DeskMagics

if TYPE_CHECKING:
    from flexmagic.client.hooks import Hook
    from flexmagic.client.table import Table


@magics_class
class HookMagics(DeskMagics):
    """Hooks: named code on whole tensors."""

    @magic_arguments()
    @argument("sites", nargs="*", help="site patterns such as model.layers.*.mlp; * is one part of the path")
    @argument("--name", help="the hook's name; the same name replaces (default: the sites)")
    @argument("--local", action="store_true", help="run on each rank's own piece, without any exchange")
    @argument("--enable", metavar="NAME", help="let a hook act again")
    @argument("--disable", metavar="NAME", help="keep a hook but do not let it act")
    @argument("--remove", metavar="NAME", help="remove a hook")
    @argument("--undo", metavar="NAME", help="go back to the hook's version before")
    @line_cell_magic
    def flexhook(self, line: str, cell: str | None = None) -> Hook | Table | None:
        """Register a hook, or list and switch those there are.

        The cell's body is the hook: ``x`` is the whole tensor, whatever the distribution; change it
        in place, assign it or return it. Also at hand: ``site``, ``index`` (the layer), ``ctx`` (a
        dict that lives as long as the run), ``module``, ``rank``, and the engines' namespace. An
        empty body only captures. Examples::

            %%flexhook model.layers.*.mlp --name damp
            x[:, -1] *= 0.5

            %flexhook               (the list)
            %flexhook --disable damp
        """
        args = parse(self.flexhook, line)
        if args is None:
            return None
        session = self._desk.session
        hooks = session.hooks
        if cell is not None or args.sites:
            name = unquoted(args.name) if args.name else None
            return session.hook(sites(args.sites), cell or "", name=name, local=args.local, first_line=2)
        if args.enable:
            hooks[unquoted(args.enable)].enabled = True
        if args.disable:
            hooks[unquoted(args.disable)].enabled = False
        if args.undo:
            hooks[unquoted(args.undo)].undo()
        if args.remove:
            hooks[unquoted(args.remove)].remove()
        return hooks.table()
