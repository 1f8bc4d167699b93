"""``%%flexhook`` and ``%flexhook``: code at sites of the model, and the list of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_cell_magic, magics_class, needs_local_scope, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import InputError
from flexmagic.magics.arguments import expanded, names, parse, sites, unquoted
from flexmagic.magics.declaring import declared
from flexmagic.magics.desk import DeskMagics

if TYPE_CHECKING:
    from argparse import Namespace

    from flexmagic.client.hook_book import HookBook
    from flexmagic.client.hooks import Hook
    from flexmagic.client.table import Table


@magics_class
class HookMagics(DeskMagics):
    """Hooks: named code on whole tensors."""

    @magic_arguments()
    @argument(
        "sites", nargs="*", help="site patterns: model.layers.*.mlp, layers.{2..5}.mlp, {0,3}, /a regular.*/"
    )
    @argument("--name", help="the hook's name; the same name replaces (default: the sites)")
    @argument("--group", help="a group, to switch several hooks together")
    @argument("--local", action="store_true", help="run on each rank's own piece, without any exchange")
    @argument(
        "--do",
        metavar="WHAT",
        help="instead of a body: zero, scale N, add EXPR [N], mean [EXPR], resample, patch EXPR, "
        "project EXPR or clamp N N",
    )
    @argument("--step", help="act in these steps of a generation: 3, 1: or 1:3; its prefill is step 0")
    @argument("--row", help="x is these rows of the whole batch: 0, -1, 1:3 or 0,2")
    @argument("--token", help="x is these token positions of the whole tensor: 0, -1, 1:3 or 0,2")
    @argument("--every", type=int, default=1, metavar="K", help="act in the runs whose number K divides")
    @argument("--when", metavar="EXPR", help="act if this holds, over run, step, ctx, site, index and seed")
    @argument("--enable", metavar="NAME", nargs="+", help="let hooks or groups act again; * is all")
    @argument("--disable", metavar="NAME", nargs="+", help="keep hooks or groups but do not let them act")
    @argument("--complement", metavar="NAME", nargs="+", help="let all hooks act but these or this group")
    @argument("--remove", metavar="NAME", nargs="+", help="remove hooks or groups")
    @argument("--undo", metavar="NAME", help="go back to the hook's version before")
    @argument("--diff", metavar="NAME", help="show what changed from the version before")
    @argument("--edit", metavar="NAME", help="bring the hook's source back into a cell")
    @argument("--export", metavar="FILE", help="write the named hooks or groups, or all, to a text file")
    @argument("--import", dest="load", metavar="FILE", help="register the hooks of such a file")
    @needs_local_scope
    @no_var_expand
    @line_cell_magic
    def flexhook(
        self, line: str, cell: str | None = None, local_ns: dict[str, Any] | None = None
    ) -> Hook | Table | None:
        """Register a hook, or list and switch those there are.

        The cell's body is the hook: ``x`` is the whole tensor, whatever the distribution; change it
        in place, assign it or return it. Also at hand: ``site``, ``index`` (the layer), ``step`` (of a
        generation), ``ctx`` (a dict that lives as long as the run), ``persistent`` (one that lives
        as long as the session), ``modules`` (the session's trainable modules), ``module``, ``rank``,
        and the engines' namespace. An empty body only captures. Several hooks on one site act in the order of
        the list, each on what the one before left. Examples::

            %%flexhook model.layers.*.mlp --name damp
            x[:, -1] *= 0.5

            %%flexhook model.layers.{2..5}.mlp --name steer --group A --step 1: --token -1
            x += 3

            %flexhook model.layers.3.mlp --do "scale 0.5" --token -1
            %flexhook model.layers.3 --do "patch run['model.layers.3']"

            %flexhook               (the list)
            %flexhook --disable damp
            %flexhook --export hooks.toml A
        """
        line = expanded(self.shell, line, local_ns)
        args = parse(self.flexhook, line)
        if args is None:
            return None
        hooks = self._desk.session.hooks
        if args.export:
            print(f"Written: {hooks.export(unquoted(args.export), *names(args.sites))}")
            return None
        if cell is not None or args.sites:
            return self._register(args, cell or "")
        return self._change(hooks, args)

    def _register(self, args: Namespace, cell: str) -> Hook:
        texts = {name: getattr(args, name) for name in ("name", "group", "step", "row", "token", "when")}
        given: dict[str, Any] = {name: unquoted(text) for name, text in texts.items() if text is not None}
        if args.do is not None:
            if cell.strip():
                raise InputError("A hook has a body or --do, not both.")
            given["code"] = declared(self.shell, unquoted(args.do))
            return self._desk.session.hook(sites(args.sites), local=args.local, every=args.every, **given)
        return self._desk.session.hook(
            sites(args.sites), cell, local=args.local, every=args.every, first_line=2, **given
        )

    def _change(self, hooks: HookBook, args: Namespace) -> Table | None:
        """What the options that name hooks ask for; the list, where they do not show anything else."""
        for switch, given in (
            (hooks.enable, args.enable),
            (hooks.disable, args.disable),
            (hooks.complement, args.complement),
        ):
            if given:
                switch(*names(given))
        for hook in hooks.named(names(args.remove or [])):
            hook.remove()
        if args.undo:
            hooks[unquoted(args.undo)].undo()
        if args.load:
            hooks.load(unquoted(args.load))
        if args.diff:
            print(hooks[unquoted(args.diff)].diff())
            return None
        if args.edit:
            assert self.shell is not None  # registered on one
            self.shell.set_next_input(hooks[unquoted(args.edit)].cell)
            return None
        return hooks.table()
