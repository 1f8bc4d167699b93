"""``%flexscan``: every site's shape for an input, without computing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.magic import line_magic, magics_class, needs_local_scope, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.magics.arguments import expanded, parse, sites
from flexmagic.magics.desk import DeskMagics
from flexmagic.magics.inputs import inputs_of

if TYPE_CHECKING:
    from flexmagic.client.scan import Scan


@magics_class
class ScanMagics(DeskMagics):
    """Shapes without runs."""

    @magic_arguments()
    @argument("prompt", nargs="*", help="a text in quotes; several make a batch")
    @argument(
        "--inputs", metavar="EXPR", help="instead of a text: ids, or a dict of the model's own arguments"
    )
    @argument("--sites", nargs="+", default=[], metavar="SITE", help="these sites only (default: all)")
    @needs_local_scope
    @no_var_expand
    @line_magic
    def flexscan(self, line: str, local_ns: dict[str, Any] | None = None) -> Scan | None:
        """Show the whole shape and dtype of every site for an input; nothing is computed.

        Example::

            %flexscan "The capital of France is" --sites model.layers.*.mlp
        """
        args = parse(self.flexscan, expanded(self.shell, line, local_ns))
        if args is None:
            return None
        session = self._desk.session
        _ = session.model  # without one, that is what to say first
        return session.scan(inputs_of(self.shell, args, "%flexscan"), sites(args.sites))
