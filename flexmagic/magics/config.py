"""``%flexconfig``: every setting, its value and where it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import line_magic, magics_class
from IPython.core.magic_arguments import magic_arguments

from flexmagic.magics.arguments import parse
from flexmagic.magics.desk import DeskMagics

if TYPE_CHECKING:
    from flexmagic.client.table import Table


@magics_class
class SettingsMagics(DeskMagics):
    """The notebook's settings."""

    @magic_arguments()
    @line_magic
    def flexconfig(self, line: str) -> Table | None:
        """Show the settings: what ``%flexcluster start`` and a kernel take where nothing else is said.

        A setting is set for all notebooks in ``ipython_config.py``, for a kernel by `flexmagic kernel
        install`, by the environment, or here. Examples::

            %flexconfig
            %config FlexMagic.engines = 4
        """
        if parse(self.flexconfig, line) is None:
            return None
        from flexmagic.client.table import Table

        rows = tuple(
            (name, repr(value), source, what) for name, value, source, what in self._desk.settings.listed()
        )
        return Table(("setting", "value", "from", "what it is"), rows, "Settings (c.FlexMagic.…)")
