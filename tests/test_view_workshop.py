"""A workshop's boards on one that is not there: what they show, what their buttons do, what they refuse."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import flexmagic.view
from flexmagic.client.table import Table
from flexmagic.errors import ClusterError, HookError, InputError
from flexmagic.view import workshop
from flexmagic.view.workshop_panel import NoticeBoard, WorkshopPanel
from flexmagic.workshop.collecting import Collected, Found
from flexmagic.workshop.notices import Board, Notice

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e"
COLUMNS = ("guest", "state", "last error")


class Workshop:
    """What the panel asks of one, with a list of what was done."""

    def __init__(self):
        self.done, self.board, self.lesson = [], Board(), self
        self.paused, self.alarm, self.allowance, self.there = False, "", "runs=60", ["ann", HOSTILE]

    def status(self):
        rows = tuple((name, "idle", f"HookError: {HOSTILE}") for name in self.there)
        return Table(COLUMNS, rows, "Workshop on c: 0 runs wait.")

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def drop(self, name):
        if name not in self.there:
            raise ClusterError(f"There is no guest {name!r}.")
        self.there.remove(name)

    def limit(self, text):
        if "=" not in text:
            raise InputError(f"{text!r} is no limit.")
        self.allowance = text
        return text

    def send(self, hook):
        return self.board.put("hook", hook.name, f"The owner offers {hook.name}.", "%%flexhook m\nx *= 2")

    def show(self, activation):
        return self.board.put("view", str(activation), f"The owner shows {activation}.")

    def collect(self, site, stat):
        return Collected(site, stat, (Found("ann", 1, 2.0), Found("ben", None, None, "no run yet")))


@pytest.fixture
def served():
    return SimpleNamespace(workshop=Workshop(), closed=False, lines={"": "%flexcluster join 127.0.0.1:1/x"})


def asked(board, **question):
    """What a page gets for a question."""
    sent = []
    board.send = lambda content, buffers=None: sent.append(content)
    board._answer(board, {"id": "k1", **question}, [])
    (answer,) = sent
    assert (answer["id"], answer["asked"]) == ("k1", question["kind"])
    return answer


def panel(served, hooks=()):
    return WorkshopPanel(served, lambda: hooks, lambda text: text.upper())


def test_the_panel_shows_guests_queue_use_and_errors_and_nothing_of_them_is_hidden(served):
    state = asked(panel(served), kind="look")
    assert state["columns"] == list(COLUMNS)
    assert state["rows"][0][:2] == ["ann", "idle"]
    assert state["names"] == ["ann", HOSTILE], "what an action names is what the guest is called"
    assert "\u202e" not in str(state["rows"])
    assert "\\u202e" in state["rows"][1][0]
    assert (state["state"], state["limits"], state["said"]) == ("open", "runs=60", "")
    assert state["lines"] == [["", "%flexcluster join 127.0.0.1:1/x"]]


def test_each_button_does_what_it_says(served):
    board, done = panel(served, [SimpleNamespace(name="damp")]), served.workshop

    def do(action, *values):
        return asked(board, kind="do", action=action, values=list(values))

    assert do("pause")["state"] == "paused"
    assert do("resume")["state"] == "open"
    assert "ann is out" in (said := do("drop", "ann"))["said"]
    assert said["names"] == [HOSTILE]
    assert do("limit", "runs=5")["limits"] == "runs=5"
    assert do("send", "damp")["sent"] == ["The owner offers damp."]
    assert do("show", "run['m']")["said"] == "The owner shows RUN['M']."
    assert do("collect", " m ", "norm")["collected"]["rows"][0][:3] == ["ann", "1", "2"]
    assert asked(board, kind="look")["collected"]["title"].startswith("norm of m"), "it stays"
    assert [notice.kind for notice in done.board.since(0)] == ["hook", "view"]


@pytest.mark.parametrize(
    ("action", "values", "said"),
    [
        ("drop", ["zoe"], "ClusterError: There is no guest 'zoe'."),
        ("limit", ["walks"], "InputError: 'walks' is no limit."),
        ("send", ["nothing"], "Choose a hook of yours to send."),
        ("show", [" "], "Type what is to be shown"),
        ("collect", ["", "mean"], "Type the site"),
        ("__init__", [], "KeyError"),
        (["pause"], [], "TypeError"),
        ("pause", ["x"], "TypeError"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_the_panel_still_shows(served, action, values, said):
    answer = asked(panel(served), kind="do", action=action, values=values)
    assert answer["said"].startswith(said)
    assert answer["rows"], "all else is shown"
    assert served.workshop.there == ["ann", HOSTILE]


def test_a_workshop_that_is_closed_says_so_and_has_no_line_to_join(served):
    served.closed = True
    state = asked(panel(served), kind="look")
    assert state["state"] == "closed"
    assert state["lines"] == [["", ""]]
    served.workshop.status = lambda: 1 / 0
    assert asked(panel(served), kind="look")["failed"]


def test_a_guests_board_shows_what_was_sent_and_says_what_is_wrong():
    notices = [
        Notice(1, "hook", "damp", f"The owner offers {HOSTILE}.", "%%flexhook m\nx *= 2"),
        Notice(2, "view", "m", "The owner shows m."),
        Notice(3, "collect", "m", "The owner collected the mean."),
    ]
    guest = SimpleNamespace(notices=SimpleNamespace(glance=lambda: notices))
    board = NoticeBoard(guest)
    shown = asked(board, kind="look")["notices"]
    assert [one["cell"] for one in shown] == ["%%flexhook m\nx *= 2", "%flexworkshop view 2", ""]
    assert "\\u202e" in shown[0]["said"]
    assert "%flexworkshop take damp" in shown[0]["typed"]
    assert asked(board, kind="do", done=True)["said"] == ""
    assert "takes no cells" in asked(board, kind="do", done=False)["said"]

    def gone():
        raise HookError("The workshop does not answer.")

    guest.notices.glance = gone
    answer = asked(board, kind="look")
    assert (answer["failed"], answer["said"]) == (True, "HookError: The workshop does not answer.")


def test_the_saved_table_is_escaped_and_marked(served, monkeypatch):
    shown = []
    monkeypatch.setattr("flexmagic.view.workshop_panel.display", lambda data, **_: shown.append(data))
    board = panel(served)
    board.show(served.workshop.status())
    live, still = shown
    assert live["application/vnd.jupyter.widget-view+json"]["model_id"] == board.model_id
    assert live["text/plain"] == ""
    assert f"flexmagic-still-{board.still_key}" in still["text/html"]
    assert "<img" not in still["text/html"]
    assert "ann" in still["text/plain"]
    assert "ann" not in str(board.get_state()), "nothing of it is in the widget's state"


def test_no_page_makes_markup_of_what_it_is_told():
    for path in (Path(flexmagic.view.__file__).parent / "static").glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", path.read_text()), (
            path
        )


def test_all_actions_of_the_panel_are_on_its_page():
    page = (Path(flexmagic.view.__file__).parent / "static" / "workshop.js").read_text()
    known = workshop.Actions(None, list, str)._known
    assert set(known) == set(re.findall(r'act\("(\w+)"', page))
