"""The Jupyter kernel of flexmagic: IPython's own kernel with the extension already loaded.

The kernel loads this package as an extension: :mod:`flexmagic`, and what its settings ask for at start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmagic_kernel.spec import DISPLAY_NAME, Start, install, is_ours, kernel_json, uninstall

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = [
    "DISPLAY_NAME",
    "Start",
    "install",
    "is_ours",
    "kernel_json",
    "load_ipython_extension",
    "uninstall",
    "unload_ipython_extension",
]


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Load :mod:`flexmagic`; with ``FlexMagic.background`` its cluster comes while cells already run."""
    from flexmagic_kernel.startup import begin

    shell.run_line_magic("load_ext", "flexmagic")
    begin(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Unload :mod:`flexmagic`, which ends what it started."""
    shell.run_line_magic("unload_ext", "flexmagic")
