"""The Jupyter kernel of flexmagic: IPython's own kernel with the extension already loaded."""

from flexmagic_kernel.spec import DISPLAY_NAME, install, uninstall

__all__ = ["DISPLAY_NAME", "install", "uninstall"]
