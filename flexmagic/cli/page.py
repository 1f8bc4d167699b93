"""A notebook run on a copy and written as one HTML file that needs nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexmagic.errors import FlexError, InputError

TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
"""
"""nbconvert's page without the scripts it would fetch from the network."""

SHOWN = [
    "text/html",
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/latex",
    "text/plain",
]
"""What a saved output is shown as, best first: no live widget, which would stay blank offline."""


def write_page(notebook: Path, page: Path, *, seconds: int = 600) -> None:
    """Run ``notebook`` from top to bottom, leaving its file as it is, and write ``page``.

    The code runs in this Python, in the notebook's directory; ``seconds`` is the limit for one
    cell. Raises :class:`InputError` if the notebook is missing or the extras for notebooks are not
    installed, :class:`FlexError` if a cell fails.
    """
    if not notebook.is_file():
        msg = f"There is no notebook {notebook}."
        raise InputError(msg)
    try:
        import nbclient
        import nbconvert
        import nbformat
    except ImportError as error:
        msg = f"{error.name} is missing. Type `pip install 'flexmagic[notebook]'`, or use --no-notebook."
        raise InputError(msg) from None
    content = nbformat.read(notebook, as_version=4)
    client = nbclient.NotebookClient(
        content,
        timeout=seconds,
        km=_this_python(),
        store_widget_state=False,
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    try:
        client.execute(cleanup_kc=True)  # the manager is ours, so nbclient would leave the kernel running
    except nbclient.exceptions.CellExecutionError as error:
        msg = f"{notebook.name} failed in a cell:\n{error}"
        raise FlexError(msg) from None
    html, _ = _exporter(nbconvert).from_notebook_node(
        content, {"metadata": {"name": notebook.stem, "path": str(notebook.parent)}}
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(html, encoding="utf-8")


def _this_python() -> Any:
    """A kernel manager for this very Python, whatever kernels are installed on the machine."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    if manager.has_trait("transport_encryption"):  # newer jupyter_client; without it ipykernel warns
        manager.transport_encryption = "auto"
    return manager


def _exporter(nbconvert: Any) -> Any:
    from jinja2 import DictLoader
    from traitlets.config import Config

    config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
    return nbconvert.HTMLExporter(
        config=config,
        template_file="page.html.j2",
        extra_loaders=[DictLoader({"page.html.j2": TEMPLATE})],
        embed_images=True,
        exclude_anchor_links=True,
    )
