"""The live view: an anywidget canvas that asks, and Python that answers with what is looked at.

Data travel as binary buffers of custom messages, never as synced traits, so a saved notebook holds
none of it. Nothing is sent unless a browser asked: a widget to which a running cell publishes
would stop answering until that cell ends.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from flexmagic.errors import FlexError
from flexmagic.view import protocol
from flexmagic.view.caption import probe
from flexmagic.view.picture import ALONE
from flexmagic.view.sheet import compose_sheet
from flexmagic.view.source import ByRank
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
    somebody chooses them. ``selected`` is the label of ``source``. ``picture_key`` marks the static
    picture beside this view, which the canvas hides once it shows live data. ``stats`` are those of
    ``source`` if they are known already.
    """

    # One ES module from several files, joined as they are: no build step, nothing fetched.
    _esm = "\n".join((_STATIC / f"{part}.js").read_text("utf-8") for part in _PARTS)
    _css = (_STATIC / "canvas.css").read_text("utf-8")
    picture_key = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        source: Source,
        siblings: Mapping[str, Callable[[], Source]] | None = None,
        selected: str | None = None,
        picture_key: str = "",
        stats: Stats | None = None,
    ) -> None:
        label = selected if selected is not None else source.info.site
        self._openers = dict(siblings or {})
        self._openers.setdefault(label, lambda: source)
        self._labels = list(self._openers)
        self._sources = {label: source}
        self._start = self._labels.index(label)
        self._held: dict[tuple[str, int], Source] = {}
        self._stats: dict[tuple[str, int | None, tuple[int, ...]], Stats] = {}
        if stats is not None:
            self._stats[label, None, source.info.missing_ranks] = stats
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

    def _apology(self, text: str) -> protocol.Message:
        title = visible(self._labels[self._start])
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
        if question.get("kind") == "probe":
            return self._probe(question), []
        if question.get("kind") == "look":
            return self._look(question)
        if question.get("kind") == "table":
            return self._table(question), []
        if question.get("kind") == "check":
            source = self._source(self._chosen(question)[0])
            return {"kind": "check", "warnings": list(disagreements(source))}, []
        text = f"the view was asked for {question.get('kind')!r}, which it does not know"
        raise FlexError(text)

    def _look(self, question: protocol.Message) -> tuple[protocol.Message, list[bytes]]:
        label, part = self._chosen(question)
        whole = self._source(label)
        source = whole if part is None else self._part(label, part)
        info = source.info
        content = {
            "kind": "picture",
            "layers": [visible(label) for label in self._labels],
            "layer": self._labels.index(label),
            "parts": protocol.parts(whole),
            "part": protocol.WHOLE if part is None else part,
        }
        if 0 in info.shape:
            content |= protocol.about(info, source, None) | protocol.nothing_to_draw(info)
            return content, []
        layers = [(text, partial(self._source, text)) for text in self._labels]
        sheet = compose_sheet(source, protocol.read_look(question), layers)
        stats = self._stats_of(label, part, source)
        content |= protocol.describe(sheet, len(layers)) | protocol.about(info, source, stats)
        view = str(question.get("view"))
        self._shown[view] = (int(question.get("id") or 0), sheet)
        _keep_last(self._shown, view)
        return content, protocol.buffers(sheet)

    def _chosen(self, question: protocol.Message) -> tuple[str, int | None]:
        """Return the label that a question is about, and the rank if it is about one rank's own."""
        layer, part = question.get("layer"), question.get("part")
        known = isinstance(layer, int) and 0 <= layer < len(self._labels)
        label = self._labels[layer if known and isinstance(layer, int) else self._start]
        ranks = {rank for rank, _ in protocol.parts(self._source(label))} - {protocol.WHOLE}
        return label, part if isinstance(part, int) and part in ranks else None

    def _part(self, label: str, rank: int) -> Source:
        """Return what one rank holds of a tensor."""
        if (label, rank) not in self._held:
            source = self._source(label)
            assert isinstance(source, ByRank)  # or it would not have been offered
            self._held[label, rank] = source.held(rank)
        return self._held[label, rank]

    def _table(self, question: protocol.Message) -> protocol.Message:
        """Return the table by rank of what this view shows, and whether replicas agree."""
        label, _ = self._chosen(question)
        source = self._source(label)
        if 0 in source.info.shape:
            return {"kind": "table", "rows": [], "notes": []}
        return {"kind": "table"} | protocol.table(rank_table(source))

    def _probe(self, question: protocol.Message) -> protocol.Message:
        """Read a cell of the picture this view shows: from what has travelled already."""
        number, sheet = self._shown.get(str(question.get("view")), (None, None))
        if sheet is None or number != question.get("picture"):
            return {"kind": "probe", "text": ""}
        pane, row, col = (int(question.get(name) or 0) for name in ("pane", "row", "col"))
        panes = sheet.panes if sheet.facet == ALONE else sheet.panes[pane : pane + 1]
        said = [(one.title, probe(one.source, one.picture, row, col)) for one in panes]
        text = "\n".join(f"{title}: {text}" if title else text for title, text in said)
        return {"kind": "probe", "picture": number, "pane": pane, "row": row, "col": col, "text": text}

    def _source(self, label: str) -> Source:
        if label not in self._sources:
            self._sources[label] = self._openers[label]()
        return self._sources[label]

    def _stats_of(self, label: str, part: int | None, source: Source) -> Stats:
        """Return the statistics, computed once for as long as the same ranks answer."""
        key = (label, part, source.info.missing_ranks)
        if key not in self._stats:
            self._stats[key] = source.stats()
        return self._stats[key]


def _keep_last(known: OrderedDict[str, Any], view: str) -> None:
    """Move a view to the end, and forget the ones nobody used for longest."""
    known.move_to_end(view)
    while len(known) > _MOST_VIEWS:
        known.popitem(last=False)
