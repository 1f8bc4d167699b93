"""What a cell says while it waits: in a terminal, in a log, and for work that nobody else tells of."""

import io
import threading
from types import SimpleNamespace

import pytest

from flexmagic.client.cells import Cells
from flexmagic.client.waiting import Waited
from flexmagic.magics import attending, status_line
from flexmagic.magics.attending import Attending
from flexmagic.magics.status_line import StatusLine, waiting


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = SimpleNamespace(time=100.0)
    for module in (status_line, attending):
        monkeypatch.setattr(module.time, "perf_counter", lambda: now.time)
    return now


@pytest.fixture
def shell():
    """A shell whose output goes into a log."""
    return SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda: {"header": {}, "metadata": {}}))


def far(done):
    return Waited(0.0, {0: ("loading", done, 40)}, pace="2.0/s, 9 s left")


def test_a_log_is_told_now_and_then(shell, clock, capsys):
    line = StatusLine(shell, "Loading")
    for second in range(25):
        clock.time = 100.0 + second
        line.tick(far(second))
    line.done("Loaded")
    assert capsys.readouterr().out.splitlines() == [
        "Loading …",
        "Loading … 11.0 s: loading, 11/40, 2.0/s, 9 s left",
        "Loading … 22.0 s: loading, 22/40, 2.0/s, 9 s left",
        "Loaded (24.0 s)",
    ]


def test_a_terminal_is_told_in_one_line(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    with waiting(SimpleNamespace(), "Loading", quiet=1.0) as line:
        for tenth in range(30):
            clock.time = 100.0 + tenth / 10
            line.tick(far(tenth))
        line.done("Loaded")
    rows = terminal.getvalue().split("\r\x1b[2K")
    assert rows[0] == ""
    assert rows[1].startswith("Loading … 1.1 s: loading, 11/40")
    assert 5 < len(rows) < 12
    assert rows[-1] == "Loaded (2.9 s)\n"


def test_what_is_over_soon_says_nothing(shell, clock, capsys):
    with waiting(shell, "Running", quiet=1.0) as line:
        line.tick()
        line.done("done")
    assert capsys.readouterr().out == ""


@pytest.fixture
def cell(shell):
    """The shell while a cell runs in it; ``cell.ends()`` ends it."""
    ended = []
    shell.events = SimpleNamespace(
        register=lambda _event, call: ended.append(call), unregister=lambda _event, call: ended.remove(call)
    )
    shell.ends = lambda: [call() for call in list(ended)]
    shell.kernel.get_parent = lambda: {"header": {"msg_type": "execute_request"}, "metadata": {}}
    return shell


def test_a_long_call_that_nobody_tells_of_gets_a_line(cell, clock, capsys):
    with Attending(cell, cancel=None).working("adopt_model") as tick:
        clock.time += 11
        tick(far(11))
    assert capsys.readouterr().out.splitlines() == [
        "Surveying …",
        "Surveying … 11.0 s: loading, 11/40, 2.0/s, 9 s left",
        "Surveying (11.0 s)",
    ]


def test_a_call_within_what_is_told_of_gets_no_line_of_its_own(cell, clock, capsys):
    with waiting(cell, "Loading the model") as line:
        with Attending(cell, cancel=None).working("make_groups") as tick:
            clock.time += 11
            tick(far(11))
        line.done("Loaded")
    with Attending(cell, cancel=None).working("run"):
        pass
    assert capsys.readouterr().out.splitlines() == [
        "Loading the model …",
        "Loading the model … 11.0 s: loading, 11/40, 2.0/s, 9 s left",
        "Loaded (11.0 s)",
        "Running …",
        "Running (0.0 s)",
    ]


def test_a_large_value_tells_how_many_bytes_have_come(cell, clock, capsys):
    with Attending(cell, cancel=None).gathering("model.norm:output") as arriving:
        for done in range(0, 401, 100):
            clock.time += 6
            arriving(done << 20, 400 << 20)
    assert capsys.readouterr().out.splitlines() == [
        "Fetching model.norm:output … 12.0 s: 100 of 400 MiB, 16.7/s, 18 s left",
        "Fetching model.norm:output … 24.0 s: 300 of 400 MiB, 16.7/s, 6 s left",
        "Fetched model.norm:output (30.0 s)",
    ]


def test_beside_a_cell_nothing_is_shown(shell, cell, clock, capsys):
    def beside():
        with Attending(cell, cancel=None).working("run") as tick:
            assert tick is None

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    cell.kernel.get_parent = lambda: {"header": {"msg_type": "comm_msg"}, "metadata": {}}
    with Attending(cell, cancel=None).gathering("a site") as arriving:
        assert arriving is None
    assert capsys.readouterr().out == ""


class Loop(Cells):
    """A session as far as a loop of a user's needs one."""

    model = None

    def __init__(self, attending):
        self._calls = SimpleNamespace(waiting=SimpleNamespace(attending=attending))


def test_a_users_loop_tells_its_pace_and_calls_within_go_on_in_its_line(cell, clock, capsys):
    attending = Attending(cell, cancel=None)
    seen = []
    for step in Loop(attending).progress(range(8), "Training"):
        seen.append(step)
        with attending.working("run") as tick:
            clock.time += 4
            tick()
    assert seen == list(range(8))
    assert capsys.readouterr().out.splitlines() == [
        "Training 2/8, 4.0 s each, 24 s left … 12.0 s",
        "Training 5/8, 4.0 s each, 12 s left … 24.0 s",
        "Training 8/8, 4.0 s each, 0 s left",
        "Training 8/8 (32.0 s)",
    ]


@pytest.mark.parametrize("end", ["break", "an error", "cancelled"])
def test_a_loop_that_ends_early_tells_how_far_it_was_once(end, cell, clock, capsys, monkeypatch):
    def loop():
        for step in Loop(Attending(cell, cancel=lambda: None)).progress(range(8)):
            clock.time += 4
            if step == 3 and end == "break":
                break
            if step == 3 and end == "an error":
                raise ZeroDivisionError
            if step == 2 and end == "cancelled":
                status_line.open_line()._cancel()

    if end == "break":
        loop()
    else:
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            loop()
    cell.ends()
    assert status_line.open_line() is None
    assert capsys.readouterr().out.splitlines()[-1].startswith("Step 3/8 (1")


def test_a_loop_in_a_script_is_only_a_loop(capsys):
    assert list(Loop(None).progress("abc")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""


def test_calls_of_a_loop_in_one_cell_take_each_others_place(cell, clock, monkeypatch):
    shown, buttons = [], []

    def display(data, **_options):
        shown.append([data["text/plain"]])
        return SimpleNamespace(update=lambda data, **_options: shown[-1].append(data["text/plain"]))

    def button(_shell, _cancel, before):
        buttons.append(before)
        return SimpleNamespace(handle="place", close=lambda: None)

    monkeypatch.setattr(status_line, "in_notebook", lambda _shell: True)
    monkeypatch.setattr(status_line, "display", display)
    monkeypatch.setattr("flexmagic.view.cancel.cancel_button", button)
    for number in ("cell 1", "cell 1", "cell 2"):
        cell.kernel.get_parent = lambda number=number: {
            "header": {"msg_type": "execute_request", "msg_id": number}
        }
        with Attending(cell, cancel=lambda: None).working("run") as tick:
            clock.time += 2
            tick()
    once = ["Running …", "Running … 2.0 s", "Running (2.0 s)"]
    assert shown == [once * 2, once]
    assert buttons == [None, "place", None]


def test_the_button_ends_what_arrives(cell, clock, monkeypatch):
    buttons, cancelled = [], []
    handle = SimpleNamespace(update=lambda *_args, **_options: None)
    monkeypatch.setattr(status_line, "in_notebook", lambda _shell: True)
    monkeypatch.setattr(status_line, "display", lambda *_args, **_options: handle)
    monkeypatch.setattr(
        "flexmagic.view.cancel.cancel_button", lambda _shell, cancel, _: buttons.append(cancel)
    )
    with Attending(cell, cancel=lambda: cancelled.append(True)).gathering("a site") as arriving:
        clock.time += 2
        arriving(1, 2)
        buttons[0]()
        with pytest.raises(KeyboardInterrupt):
            arriving(2, 2)
    assert cancelled == [True]


def test_a_text_that_grows_is_told_now_and_then_in_a_log_and_its_end_in_any_case(shell, clock, capsys):
    line = StatusLine(shell, "Generating")
    for word in range(15):
        clock.time += 1
        line.now(f"Generating {word}")
    line.done("<Generation>")
    assert capsys.readouterr().out.splitlines() == [
        "Generating …",
        "Generating 10 …",
        "Generating 14",
        "<Generation> (15.0 s)",
    ]


def test_a_line_is_cut_at_the_width_of_the_terminal(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(status_line.shutil, "get_terminal_size", lambda: SimpleNamespace(columns=20))
    line = StatusLine(SimpleNamespace(), "x" * 30)
    line.done("y" * 30)
    shown = terminal.getvalue().split("\r\x1b[2K")
    assert shown == ["", f"{'x' * 18}…", f"{'y' * 30} (0.0 s)\n"]
