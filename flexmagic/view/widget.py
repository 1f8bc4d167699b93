"""The live view: an anywidget canvas that asks, and Python that answers with what is looked at.

Data travel as binary buffers of custom messages, never as synced traits, so a saved notebook holds
none of it. Nothing is sent unless a browser asked, except that ranks have ended: a widget to which a
running cell publishes would stop answering until that cell ends.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from flexmagic.errors import FlexError
from flexmagic.view import protocol
from flexmagic.view.caption import probe
from flexmagic.view.family import Family
from flexmagic.view.growing import GrowingText
from flexmagic.view.picture import ALONE
from flexmagic.view.sheet import compose_sheet
from flexmagic.view.source import ByRank, Mortal
from flexmagic.view.table import disagreements, rank_table
from flexmagic.view.words import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ipywidgets import DOMWidget

    from flexmagic.view.sheet import Sheet
    from flexmagic.view.source import Source, Stats

_STATIC = Path(__file__).parent / "static"
_PARTS = ("ask", "paint", "lines", "pane", "table", "view")
_MOST_VIEWS = 16
Place = tuple[int, int]
"""Which layer and which step of a family."""


def answer_where_asked(widget: DOMWidget) -> None:
    """Let messages be handled on the channel they come by, also while this cell still runs.

    ipykernel 7 routes them to the loop that last published on a comm, which for a new widget is the
    one that runs the cell; forgetting it leaves the front end's own choice.
    """
    if widget.comm is not None and hasattr(widget.comm, "_reply_subshell_id"):
        del widget.comm._reply_subshell_id  # noqa: SLF001 - there is no public way


class TensorView(anywidget.AnyWidget):
    """A live view of one tensor, or of the one chosen among its siblings.

    ``siblings`` maps a label (a layer) to a function that returns its source; they are called when
    somebody chooses them. ``selected`` is the label of ``source``. ``steps`` and ``step`` are the same for
    other steps of its run: a label and what returns the siblings there. ``picture_key`` marks the
    static picture beside this view, which the canvas hides once it shows live data. ``stats`` are those
    of ``source`` if they are known already.
    """

    # One ES module from several files, joined as they are: no build step, nothing fetched.
    _esm = "\n".join((_STATIC / f"{part}.js").read_text("utf-8") for part in _PARTS)
    _css = (_STATIC / "canvas.css").read_text("utf-8")
    picture_key = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        source: Source | GrowingText,
        siblings: Mapping[str, Callable[[], Source]] | None = None,
        selected: str | None = None,
        *,
        picture_key: str = "",
        stats: Stats | None = None,
        steps: Mapping[str, Callable[[], Mapping[str, Callable[[], Source]]]] | None = None,
        step: str | None = None,
    ) -> None:
        self._family = Family(source, siblings, selected, steps, step)
        self._start = self._family.layer, self._family.step
        self._held: dict[tuple[Place, int], Source] = {}
        self._stats: dict[tuple[Place, int | None, tuple[int, ...]], Stats] = {}
        if stats is not None and not isinstance(source, GrowingText):
            self._stats[self._start, None, source.info.missing_ranks] = stats
        self._shown: OrderedDict[str, tuple[int, Sheet]] = OrderedDict()
        self._newest: OrderedDict[str, int] = OrderedDict()
        # Front ends may deliver messages on several threads, while a cell runs too.
        self._lock = threading.Lock()
        super().__init__(picture_key=picture_key)
        self.on_msg(self._answer)
        answer_where_asked(self)

    def _answer(self, _: Any, question: protocol.Message, __: list[bytes]) -> None:
        """Answer one question of a browser, with a sentence if it cannot be answered.

        A question that waited behind a running cell while later ones were answered is dropped: the
        browser no longer wants it, and it would only move data.
        """
        if question.get("kind") == "look" and self._is_stale(question):
            return
        head = {key: question.get(key) for key in ("view", "id", "kind")} | {"asked": question.get("kind")}
        try:
            with self._lock:
                content, buffers = self._reply(question)
        except FlexError as error:
            content, buffers = self._apology(str(error)), []
        except Exception as error:  # noqa: BLE001 - a browser that waits must hear what went wrong
            content, buffers = self._apology(f"{type(error).__name__}: {error}"), []
        self.send(head | content, buffers)

    def ranks_ended(self, ranks: tuple[int, ...]) -> None:
        """Tell the pages that show this view, which look again if they show something of these ranks."""
        self.send({"kind": "ended", "ranks": list(ranks)})
        answer_where_asked(self)

    def _apology(self, text: str) -> protocol.Message:
        title = visible(self._family.layers[self._start[0]])
        return {"kind": "error", "title": title, "text": visible(text, 2000)}

    def _is_stale(self, question: protocol.Message) -> bool:
        view, number = str(question.get("view")), int(question.get("id") or 0)
        with self._lock:
            if number < self._newest.get(view, 0):
                return True
            self._newest[view] = number
            _keep_last(self._newest, view)
        return False

    def _reply(self, question: protocol.Message) -> tuple[protocol.Message, list[bytes]]:
        answer = ANSWERS.get(str(question.get("kind")))
        if answer is None:
            text = f"the view was asked for {question.get('kind')!r}, which it does not know"
            raise FlexError(text)
        return answer(self, question)

    def _look(self, question: protocol.Message) -> tuple[protocol.Message, list[bytes]]:
        """Draw a part of a tensor, and tell all that stands around the picture."""
        place, part = self._chosen(question)
        whole = self._family.at(*place)
        self._hear_of(whole)
        source = whole if part is None else self._part(place, part)
        info = source.info
        content = {
            "kind": "picture",
            "layers": [visible(label) for label in self._family.layers],
            "layer": place[0],
            "steps": [visible(label) for label in self._family.steps],
            "step": place[1],
            "parts": protocol.parts(whole),
            "part": protocol.WHOLE if part is None else part,
            "growing": bool(getattr(source, "growing", False)),
        }
        if 0 in info.shape:
            content |= protocol.about(info, source, None) | protocol.nothing_to_draw(info)
            if content["growing"]:
                content["empty"] = "Waiting for the first token."
            return content, []
        layers, steps = self._family.beside(*place)
        sheet = compose_sheet(source, protocol.read_look(question), layers, steps)
        for pane in sheet.panes:
            self._hear_of(pane.source)
        stats = self._stats_of(place, part, source)
        content |= protocol.describe(sheet, len(layers), len(steps)) | protocol.about(info, source, stats)
        view = str(question.get("view"))
        self._shown[view] = (int(question.get("id") or 0), sheet)
        _keep_last(self._shown, view)
        return content, protocol.buffers(sheet)

    def _hear_of(self, source: Source) -> None:
        if isinstance(source, Mortal):
            source.tell_of_endings(self)

    def _chosen(self, question: protocol.Message) -> tuple[Place, int | None]:
        """Return the layer and step that a question is about, and the rank if it is about one rank's own."""
        family, part = self._family, question.get("part")
        layer, step = (
            asked if isinstance(asked, int) and 0 <= asked < len(known) else start
            for asked, known, start in (
                (question.get("layer"), family.layers, self._start[0]),
                (question.get("step"), family.steps, self._start[1]),
            )
        )
        ranks = {rank for rank, _ in protocol.parts(family.at(layer, step))} - {protocol.WHOLE}
        return (layer, step), part if isinstance(part, int) and part in ranks else None

    def _part(self, place: Place, rank: int) -> Source:
        """Return what one rank holds of a tensor."""
        if (place, rank) not in self._held:
            source = self._family.at(*place)
            assert isinstance(source, ByRank)  # or it would not have been offered
            self._held[place, rank] = source.held(rank)
        return self._held[place, rank]

    def _check(self, question: protocol.Message) -> tuple[protocol.Message, list[bytes]]:
        """Warn of replicas that differ."""
        source = self._family.at(*self._chosen(question)[0])
        return {"kind": "check", "warnings": list(disagreements(source))}, []

    def _table(self, question: protocol.Message) -> tuple[protocol.Message, list[bytes]]:
        """Return the table by rank of what this view shows, and whether replicas agree."""
        place, _ = self._chosen(question)
        source = self._family.at(*place)
        if 0 in source.info.shape:
            return {"kind": "table", "rows": [], "notes": []}, []
        return {"kind": "table"} | protocol.table(rank_table(source)), []

    def _probe(self, question: protocol.Message) -> tuple[protocol.Message, list[bytes]]:
        """Read a cell of the picture this view shows: from what has travelled already."""
        number, sheet = self._shown.get(str(question.get("view")), (None, None))
        if sheet is None or number != question.get("picture"):
            return {"kind": "probe", "text": ""}, []
        pane, row, col = (int(question.get(name) or 0) for name in ("pane", "row", "col"))
        panes = sheet.panes if sheet.facet == ALONE else sheet.panes[pane : pane + 1]
        said = [(one.title, probe(one.source, one.picture, row, col)) for one in panes]
        text = "\n".join(f"{title}: {text}" if title else text for title, text in said)
        return {"kind": "probe", "picture": number, "pane": pane, "row": row, "col": col, "text": text}, []

    def _stats_of(self, place: Place, part: int | None, source: Source) -> Stats:
        """Return the statistics, computed once for as long as the same ranks answer."""
        if hasattr(source, "growing"):
            return source.stats()
        key = (place, part, source.info.missing_ranks)
        if key not in self._stats:
            self._stats[key] = source.stats()
        return self._stats[key]


ANSWERS = {
    "look": TensorView._look,  # noqa: SLF001 - its own module
    "probe": TensorView._probe,  # noqa: SLF001
    "table": TensorView._table,  # noqa: SLF001
    "check": TensorView._check,  # noqa: SLF001
}
"""What browsers ask a view, by the question's ``kind``."""


def _keep_last(known: OrderedDict[str, Any], view: str) -> None:
    """Move a view to the end, and forget the ones nobody used for longest."""
    known.move_to_end(view)
    while len(known) > _MOST_VIEWS:
        known.popitem(last=False)
