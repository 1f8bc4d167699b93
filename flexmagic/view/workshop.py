"""What a workshop's boards show, the owner's and a guest's, as plain values, all text made visible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flexmagic.view.words import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    State = dict[str, Any]

CELL, SAID = 160, 2000
"""Characters of the longest cell of a table, and of the longest sentence."""


def table_of(table: Any) -> State:
    """Return a table's heads and rows."""
    return {
        "columns": [visible(head, CELL) for head in table.columns],
        "rows": [[visible(cell, CELL) for cell in row] for row in table.rows],
        "title": visible(table.title, SAID),
    }


def owners(server: Any, hooks: Iterable[Any]) -> State:
    """Return all that the owner's panel shows: guests, queue, use, errors, limits, and what can be sent.

    ``names`` are the guests as they are called, in the order of the rows: what an action is about.
    """
    workshop = server.workshop
    table = workshop.status()
    return {
        **table_of(table),
        "names": [row[0] for row in table.rows],
        "state": "closed" if server.closed else "paused" if workshop.paused else "open",
        "alarm": visible(workshop.alarm, SAID),
        "limits": visible(str(workshop.allowance), SAID),
        "lines": [
            [visible(name, CELL), "" if server.closed else visible(line, SAID)]
            for name, line in server.lines.items()
        ],
        "hooks": [hook.name for hook in hooks],
        "sent": [visible(notice.said, SAID) for notice in workshop.board.since(0)],
    }


def guests(notices: Iterable[Any]) -> State:
    """Return all that a guest's board shows: what was sent, and the cell that one click puts below."""
    return {
        "notices": [
            {
                "number": one.number,
                "said": visible(one.said, SAID),
                "cell": one.cell or (f"%flexworkshop view {one.number}" if one.kind == "view" else ""),
                "does": {"hook": "Take it as a cell", "view": "Look at it"}.get(one.kind, ""),
                "typed": visible(one.line.removeprefix(one.said).strip(), SAID),
            }
            for one in notices
        ]
    }


class Actions:
    """What the owner's buttons do, each with the sentence that comes of it.

    ``hooks``: the owner's; ``value``: of an expression of the notebook.
    """

    def __init__(self, server: Any, hooks: Callable[[], Iterable[Any]], value: Callable[[str], Any]) -> None:
        self._server, self._hooks, self._value = server, hooks, value
        self.collected: State | None = None
        self._known: dict[str, Callable[..., str]] = {
            "pause": self._pause, "resume": self._resume, "drop": self._drop, "limit": self._limit,
            "send": self._send, "show": self._show, "collect": self._collect,
        }  # fmt: skip

    def do(self, action: Any, values: Any) -> str:
        """Do one of them; raises what it refuses with, and :class:`KeyError` for none of them."""
        return self._known[action](*map(str, values))

    def _pause(self) -> str:
        self._server.workshop.pause()
        return "Paused: no more runs begin."

    def _resume(self) -> str:
        self._server.workshop.resume()
        return "Runs go on."

    def _drop(self, name: str) -> str:
        self._server.workshop.drop(name)
        return f"{name} is out: hooks and runs are gone."

    def _limit(self, text: str) -> str:
        return f"Each guest may have {self._server.workshop.limit(text)}."

    def _send(self, name: str) -> str:
        hook = next((hook for hook in self._hooks() if hook.name == name), None)
        if hook is None:
            return "Choose a hook of yours to send."
        return str(self._server.workshop.lesson.send(hook).said)

    def _show(self, text: str) -> str:
        if not text.strip():
            return 'Type what is to be shown, such as run["model.layers.3.mlp"].'
        return str(self._server.workshop.lesson.show(self._value(text)).said)

    def _collect(self, site: str, stat: str) -> str:
        if not site.strip():
            return "Type the site of which the statistic is collected."
        found = self._server.workshop.lesson.collect(site.strip(), stat)
        self.collected = table_of(found.table())
        return f"{len(found.values)} of {len(found.found)} guests have it."
