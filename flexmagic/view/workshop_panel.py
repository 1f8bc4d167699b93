"""The live boards of a workshop: a panel for its owner, and what the owner has sent in a guest's notebook.

The page asks and Python answers, also while a cell runs; nothing is published but as an answer. A guest's
page asks every few seconds for as long as it is looked at, so that what is sent appears by itself.
"""

from __future__ import annotations

import html
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets
from IPython.display import display

from flexmagic.errors import FlexError
from flexmagic.view import workshop
from flexmagic.view.panel import plain
from flexmagic.view.widget import answer_where_asked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_STATIC = Path(__file__).parent / "static"


def _joined(*names: str) -> str:
    """Return an ES module, or a sheet, of several files as they are."""
    return "\n".join((_STATIC / name).read_text("utf-8") for name in names)


class Board(anywidget.AnyWidget):
    """A board that answers a page's questions with all it shows, and with a sentence of what was done.

    ``still_key`` marks the table beside it, which the page hides while the board is live.
    """

    _css = _joined("panel.css", "workshop.css")
    still_key = traitlets.Unicode("").tag(sync=True)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        super().__init__(still_key=uuid.uuid4().hex)
        self.add_class("flexmagic-panel")
        self.on_msg(self._answer)
        answer_where_asked(self)

    def _answer(self, _: Any, question: dict[str, Any], __: list[bytes]) -> None:
        said = ""
        try:
            if question.get("kind") == "do":
                with self._lock:  # front ends may deliver messages on several threads
                    said = self._do(question)
            state = self._state()
        except FlexError as error:
            said, state = f"{type(error).__name__}: {error}", self._rest()
        except Exception as error:  # noqa: BLE001 - a browser that waits must hear what went wrong
            said, state = f"{type(error).__name__}: {error}", self._rest()
        self.send({**state, "id": question.get("id"), "asked": question.get("kind"), "said": plain(said)})

    def _rest(self) -> dict[str, Any]:
        """Return what can be shown after something was refused."""
        try:
            return self._state()
        except Exception:  # noqa: BLE001 - why is said already
            return {"failed": True}

    def _do(self, question: dict[str, Any]) -> str:
        """Do what was asked for; return what is said of it."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        """Return all that is shown."""
        raise NotImplementedError

    def show(self, still: Any) -> None:
        """Display the board, and beside it a table that saved notebooks keep."""
        reference = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        display({"application/vnd.jupyter.widget-view+json": reference, "text/plain": ""}, raw=True)
        key = html.escape(self.still_key)
        table = f'<div class="flexmagic-still-{key}">{still._repr_html_()}</div>'
        display({"text/plain": str(still), "text/html": table}, raw=True)


class WorkshopPanel(Board):
    """Guests, queue, use and errors, and the buttons of a workshop's owner.

    ``hooks`` returns the owner's hooks, which can be sent; ``value`` the value of an expression of the
    notebook, which can be shown.
    """

    _esm = _joined("board.js", "workshop.js")

    def __init__(self, server: Any, hooks: Callable[[], Iterable[Any]], value: Callable[[str], Any]) -> None:
        self._server, self._hooks = server, hooks
        self._actions = workshop.Actions(server, hooks, value)
        super().__init__()

    def _do(self, question: dict[str, Any]) -> str:
        return self._actions.do(question.get("action"), question.get("values") or ())

    def _state(self) -> dict[str, Any]:
        return {**workshop.owners(self._server, self._hooks()), "collected": self._actions.collected}


class NoticeBoard(Board):
    """What the owner of a workshop has sent, in a guest's notebook: hooks to take, tensors to look at."""

    _esm = _joined("insert_cell.js", "board.js", "notices.js")

    def __init__(self, guest: Any) -> None:
        self._guest = guest
        super().__init__()

    def _do(self, question: dict[str, Any]) -> str:
        return (
            "" if question.get("done") else "This front end takes no cells from a board: type what it says."
        )

    def _state(self) -> dict[str, Any]:
        return workshop.guests(self._guest.notices.glance())
