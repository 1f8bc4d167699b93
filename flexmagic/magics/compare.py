"""``%flexcompare``: two runs, or one prompt with and without a hook, site by site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_magic, magics_class, needs_local_scope, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import InputError
from flexmagic.magics.arguments import expanded, names, parse, sites
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.inputs import inputs_of, value_of

if TYPE_CHECKING:
    from flexmagic.view.compare import Comparison


@magics_class
class CompareMagics(DeskMagics):
    """Two runs beside each other."""

    @magic_arguments()
    @argument("prompt", nargs="*", help="two runs or activations; with --hook, a text in quotes")
    @argument("--inputs", metavar="EXPR", help="with --hook, instead of a text: ids or the model's arguments")
    @argument("--hook", nargs="+", metavar="NAME", help="run without and with these hooks or groups")
    @argument("--capture", nargs="+", default=[], metavar="SITE", help="with --hook: compare these sites too")
    @argument("--seed", type=int, default=0, help="with --hook: fixes all random draws in hooks")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexcompare(self, line: str, local_ns: dict[str, Any] | None = None) -> Comparison | None:
        """Compare two runs, or what one prompt gives without and with a hook, the most changed first.

        Bit-equal and close are told apart; sites that only one has, or whose shapes differ, are listed.
        The view shows A, B and B - A of the site that you choose. Examples::

            %flexcompare before after
            %flexcompare "Paris is" --hook damp --capture model.layers.*
        """
        args = parse(self.flexcompare, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        from flexmagic.view.compare import compare

        if args.hook is None:
            if len(args.prompt) != 2 or args.inputs or args.capture:
                raise InputError(
                    "Name two runs or activations: %flexcompare before after. Or give --hook NAME."
                )
            return compare(*(value_of(self.shell, "%flexcompare", text) for text in args.prompt))
        session = self._desk.session
        hooks = session.hooks.named(names(args.hook))
        capture = [*sites(args.capture), *(site for hook in hooks for site in hook.sites)]
        inputs = inputs_of(self.shell, args, "%flexcompare")
        options = {"capture": capture, "seed": args.seed}
        without = session.run(inputs, without=[hook.name for hook in hooks], **options)
        acting = list(dict.fromkeys(hook.name for hook in [*session.hooks.enabled, *hooks]))
        return compare(without, session.run(inputs, only=acting, **options))
