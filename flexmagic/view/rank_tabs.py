"""Values that differ between ranks, a tab for each rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexmagic.view.words import visible


def show(values: Mapping[int, Any]) -> None:
    """Show each rank's value in a tab of its own; as text, one below the other, where widgets do not live."""
    from IPython.display import display
    from ipywidgets import Output, Tab

    children = []
    for value in values.values():
        output = Output()
        output.append_display_data(value)
        children.append(output)
    tabs = Tab(children=children, titles=[f"rank {rank}" for rank in values])
    text = "\n".join(f"rank {rank}: {visible(repr(value), 10_000)}" for rank, value in values.items())
    display(tabs._repr_mimebundle_() | {"text/plain": text}, raw=True)
