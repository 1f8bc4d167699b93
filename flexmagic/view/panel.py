"""What the panels share: a message line, tables, and buttons whose failures are sentences."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import ipywidgets

from flexmagic.errors import FlexError
from flexmagic.view.said import Said
from flexmagic.view.widget import answer_where_asked
from flexmagic.view.words import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MOST = 4000


def escaped(text: str) -> str:
    """Return a text of whatever origin as HTML that shows it and runs nothing of it."""
    return html.escape(plain(text))


def plain(text: str) -> str:
    """Return a text with everything invisible in it escaped, its lines as they are."""
    return "\n".join(visible(line, MOST) for line in text.split("\n"))


class Panel(ipywidgets.VBox):
    """A box with a line for messages.

    A click while a cell runs is answered at once where the front end asks on a channel of its own,
    else after the cell. Nothing is published but in answer to somebody's click.
    """

    def __init__(self) -> None:
        self.said = Said()
        super().__init__()
        self.add_class("flexmagic-panel")

    def say(self, text: str) -> None:
        """Show a message, or take it away."""
        self.said.text = plain(text)

    def does(self, action: Callable[[], str | None]) -> Callable[[Any], None]:
        """Return what a button calls: the action, then what it returned or refused with as a message."""

        def clicked(_: Any) -> None:
            try:
                self.say(action() or "")
            except FlexError as error:
                self.say(f"{type(error).__name__}: {error}")
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - who clicked must hear of anything
                self.say(f"{type(error).__name__}: {error}")

        return clicked

    def button(self, text: str, action: Callable[[], str | None], tip: str = "") -> ipywidgets.Button:
        """Return a button that does something."""
        made = ipywidgets.Button(description=text, tooltip=tip or text)
        made.layout.width = "auto"
        made.on_click(self.does(action))
        return made

    def settle(self) -> Panel:
        """Let clicks be answered on the channel they come by, also while a cell still runs."""
        for widget in _all(self):
            answer_where_asked(widget)
        return self


def _all(widget: ipywidgets.Widget) -> Iterable[ipywidgets.Widget]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from _all(child)
