"""``%flexpanel``: panels for the model, the hooks and the cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from flexmagic.errors import ClusterError, InputError
from flexmagic.magics.arguments import parse
from flexmagic.magics.desk import DeskMagics

if TYPE_CHECKING:
    from flexmagic.view.panel import Panel

WHAT = ("model", "hooks", "cluster")


@magics_class
class PanelMagics(DeskMagics):
    """Panels of controls."""

    @magic_arguments()
    @argument("what", nargs="?", default="cluster", help="model, hooks or cluster (the default)")
    @line_magic
    def flexpanel(self, line: str) -> Panel | None:
        """Show controls: the model's sites, the hooks, or the ranks.

        Examples::

            %flexpanel model     (search sites, see layouts and hooks, write a hook)
            %flexpanel hooks     (switch, edit with a check of the syntax, go back)
            %flexpanel cluster   (what each rank does; recover, cancel)
        """
        args = parse(self.flexpanel, line)
        if args is None:
            return None
        if args.what not in WHAT:
            raise InputError(f"%flexpanel has no panel {args.what!r}. Panels: {', '.join(WHAT)}.")
        from flexmagic.view.panels import ClusterPanel, HooksPanel, ModelPanel

        if self._desk.is_guest(self._desk.session):
            raise ClusterError("Panels are the owner's in a workshop: %flexhook lists your hooks.")
        kinds = {"model": ModelPanel, "hooks": HooksPanel, "cluster": ClusterPanel}
        return kinds[args.what](self._desk.session)
