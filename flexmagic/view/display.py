"""What showing a tensor means in a terminal, in a live notebook and in a saved one.

A notebook gets three outputs in a row: the live view, the header as text, and the picture. They
are separate because a converter shows only the richest form of one output, and where widget state
was stored that is the widget, which needs a network; the saved page would be blank offline. A live
view that has data hides the other two.
"""

from __future__ import annotations

import base64
import html
import struct
import uuid
from typing import TYPE_CHECKING, Any

from IPython import get_ipython
from IPython.display import display

from flexmagic.errors import FlexError
from flexmagic.view.compare import HEAD
from flexmagic.view.png import PAGE_WIDTH, to_png
from flexmagic.view.text import body, heading
from flexmagic.view.widget import TensorView
from flexmagic.view.words import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flexmagic.view.compare import Comparison
    from flexmagic.view.source import Source

_WIDGET = "application/vnd.jupyter.widget-view+json"
_PNG_SIZE = slice(16, 24)


def show(
    source: Source,
    siblings: Mapping[str, Callable[[], Source]] | None = None,
    selected: str | None = None,
    steps: Mapping[str, Callable[[], Mapping[str, Callable[[], Source]]]] | None = None,
    step: str | None = None,
) -> TensorView | None:
    """Show a tensor wherever one is: as text in a terminal, live and as a picture in a notebook.

    ``siblings`` are other tensors to choose from, by label, opened when chosen; ``selected`` is the
    label of ``source`` among them. ``steps`` maps the label of a step of the same run to what returns
    the siblings there, ``step`` being that of ``source``. Returns the live view where there is one.
    What cannot be read is said where the picture would be, and the live view offers to try again.
    """
    if not in_notebook():
        shown = _body(source)
        print(heading(source), shown, sep="\n")  # noqa: T201 - a terminal's display
        return None
    key = uuid.uuid4().hex
    still, drawn = picture(source, key)
    view = TensorView(source, siblings, selected, picture_key=key, steps=steps, step=step)
    display(live(view), raw=True)
    display({"text/plain": heading(source)}, raw=True)
    display(still, raw=True, metadata=drawn)
    return view


def show_comparison(found: Comparison) -> TensorView | None:
    """Show a comparison: its table, and the most changed of what can be drawn as A | B | B-A."""
    if not in_notebook():
        print(found)  # noqa: T201 - a terminal's display
        return None
    display({"text/plain": str(found), "text/html": table_html(found)}, raw=True)
    openers = found.openers
    if not openers:
        return None
    first = next(iter(openers))
    return show(openers[first](), openers, first)


def table_html(found: Comparison) -> str:
    """Return the table of a comparison, everything escaped."""
    cell = 'style="text-align:left;padding:1px 14px 1px 0"'
    head = "".join(f"<th {cell}>{html.escape(text)}</th>" for text in HEAD)
    rows = "".join(
        "<tr>" + "".join(f"<td {cell}>{html.escape(text)}</td>" for text in row.texts) + "</tr>"
        for row in found
    )
    title = f"<p><b>{html.escape(visible(found.title, 400))}</b></p>" if found.title else ""
    return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def in_notebook() -> bool:
    """Return whether what is displayed reaches a front end: IPython runs inside a kernel."""
    return getattr(get_ipython(), "kernel", None) is not None


def live(view: TensorView) -> dict[str, Any]:
    """Return the output that front ends turn into the live view.

    Its text is empty: where there are no widgets, the two outputs after it say everything.
    """
    reference = {"version_major": 2, "version_minor": 0, "model_id": view.model_id}
    return {_WIDGET: reference, "text/plain": ""}


def picture(source: Source, key: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the still output and its metadata: a PNG, and statistics and some values as text."""
    try:
        png = to_png(source, key=key)
    except FlexError:
        return {"text/plain": _body(source)}, {}
    data = {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": _body(source)}
    return data, {"image/png": _drawn_size(png)}


def _body(source: Source) -> str:
    """Return statistics and some values as text, or why they cannot be read."""
    try:
        return body(source)
    except FlexError as error:
        return f"  {type(error).__name__}: {visible(str(error), 2000)}"


def _drawn_size(png: bytes) -> dict[str, int]:
    """Return the size at which to draw a PNG, in CSS pixels: it has more pixels than that."""
    width, height = struct.unpack(">II", png[_PNG_SIZE])
    return {"width": PAGE_WIDTH, "height": round(height * PAGE_WIDTH / width)}
