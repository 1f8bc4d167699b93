"""Look inside distributed neural networks from a notebook.

``%load_ext flexmagic`` adds the magics; :class:`Session` is the same in plain Python.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from flexmagic.errors import (
    CellError,
    ClusterError,
    EngineError,
    FlexError,
    HookError,
    InputError,
    LayoutError,
    ModelError,
    SiteError,
    StuckError,
)

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from flexmagic.client.activation import Activation
    from flexmagic.client.hooks import Hook
    from flexmagic.client.model import Model
    from flexmagic.client.run import Run
    from flexmagic.client.session import Session
    from flexmagic.view.compare import compare
    from flexmagic.view.forms import grid, lines, strip

__version__ = _version("flexmagic")

__all__ = [
    "Activation",
    "CellError",
    "ClusterError",
    "EngineError",
    "FlexError",
    "Hook",
    "HookError",
    "InputError",
    "LayoutError",
    "Model",
    "ModelError",
    "Run",
    "Session",
    "SiteError",
    "StuckError",
    "compare",
    "grid",
    "lines",
    "strip",
]

_LAZY = {
    "Activation": "flexmagic.client.activation",
    "Hook": "flexmagic.client.hooks",
    "Model": "flexmagic.client.model",
    "Run": "flexmagic.client.run",
    "Session": "flexmagic.client.session",
    "compare": "flexmagic.view.compare",
    "grid": "flexmagic.view.forms",
    "lines": "flexmagic.view.forms",
    "strip": "flexmagic.view.forms",
}


def __getattr__(name: str) -> Any:
    """Load the public API when they are first asked for: importing stays light."""
    if name not in _LAZY:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_LAZY[name]), name)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics; nothing else happens until one of them is used."""
    from flexmagic.magics import load

    load(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take the magics away again and end what they started."""
    from flexmagic.magics import unload

    unload(shell)
