"""What ranks print and display while they run, shown once where they agree."""

import logging
import sys

import pytest

from flexmagic.client.streaming import Streaming
from flexmagic.client.waiting import Waited
from flexmagic.engine import prints
from flexmagic.engine.prints import Prints
from flexmagic.engine.screen import Bundle, Screen

RED, BLUE = (Bundle({"text/html": f"<b>{color}</b>"}) for color in ("red", "blue"))


@pytest.fixture
def shown():
    return []


@pytest.fixture
def streaming(shown):
    return Streaming(shown.append, 2, shown.append)


def heard(streaming, texts, **more):
    """Let it hear what ranks have printed by now."""
    streaming.beside(lambda _waited: None)(Waited(1.0, {}, texts, **more))


def ended(streaming, *texts, displayed=({}, {})):
    streaming.end(texts, displayed)


def test_lines_that_all_ranks_have_printed_are_shown_at_once_and_once(streaming, shown):
    heard(streaming, {0: "a\nb\n"})
    assert shown == []
    heard(streaming, {0: "a\nb\n", 1: "a\n"})
    heard(streaming, {0: "a\nb\n", 1: "a\nb\n"})
    assert shown == ["a", "b"]
    ended(streaming, "a\nb\nc", "a\nb\nc")
    assert shown == ["a", "b", "c"]


@pytest.mark.parametrize("meanwhile", [True, False])
def test_from_where_ranks_differ_each_is_shown_by_itself(streaming, shown, meanwhile):
    if meanwhile:
        heard(streaming, {0: "a\nmine\n", 1: "a\nyours\n"})
    ended(streaming, "a\nmine\nb\n", "a\nyours\nb\n")
    assert shown == ["a", "[rank 0] mine", "[rank 0] b", "[rank 1] yours", "[rank 1] b"]


def test_the_next_run_begins_anew_however_the_last_ended(streaming, shown):
    heard(streaming, {0: "a\n", 1: "a\n"})
    ended(streaming, "a\n", "a\n")
    ended(streaming, "a\n", "a\n")
    heard(streaming, {0: "lost\n", 1: "lost\n"})
    streaming.end()
    heard(streaming, {0: "b\n", 1: "b\n"})
    ended(streaming, "b\n", "b\n")
    assert shown == ["a", "a", "lost", "b"]


def test_nothing_printed_shows_nothing(streaming, shown):
    ended(streaming, "", "")
    assert shown == []


def test_progress_hears_the_same_beside_it(streaming, shown):
    told = []
    waited = Waited(1.0, {}, {0: "a\n", 1: "a\n"})
    streaming.beside(told.append)(waited)
    assert told == [waited]
    assert shown == ["a"]
    assert streaming.beside(None) is None


def test_bars_that_went_at_different_speeds_are_one_bar(streaming, shown):
    fast = "100%|##########| 40/40 [00:01<00:00,  40.0it/s]"
    slow = "100%|##########| 40/40 [00:02<00:00,  20.0it/s]"
    ended(streaming, f"{fast}\ndone\n", f"{slow}\ndone\n")
    assert shown == [f"{fast}\ndone"]


def test_what_all_ranks_display_is_displayed_once_in_its_place(streaming, shown):
    text = f"before\n{RED.mark(0)}after\n"
    heard(streaming, {0: text, 1: text}, shown={0: {0: RED}, 1: {0: RED}})
    ended(streaming, text, text, displayed=({0: RED}, {0: RED}))
    assert shown == ["before", RED, "after"]


def test_what_ranks_display_differently_is_displayed_by_rank(streaming, shown):
    ended(streaming, f"a\n{RED.mark(0)}", f"a\n{BLUE.mark(0)}", displayed=({0: RED}, {0: BLUE}))
    assert shown == ["a", "[rank 0]", RED, "[rank 1]", BLUE]


def test_what_ranks_write_otherwise_is_shown_too(streaming, shown):
    heard(streaming, {}, aside={0: "INFO loaded\n", 1: "INFO loaded\n"})
    heard(streaming, {}, aside={0: "INFO loaded\nmine\n", 1: "INFO loaded\nyours\n"})
    ended(streaming, "printed\n", "printed\n")
    assert shown == ["INFO loaded", "printed", "[rank 0] mine", "[rank 1] yours"]


# --- on a rank ---------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(prints, "EVERY", 0.0)
    return []


def test_a_rank_tells_whole_lines_and_keeps_everything(told):
    screen = Screen()
    with Prints(told.append).taken(screen):
        print("one")
        print("half", end="")
        sys.stderr.write(" careful\n")
    assert [said.text for said in told] == ["one\n", "one\nhalf careful\n"]
    assert screen.getvalue() == "one\nhalf careful\n"


def test_a_flood_is_told_up_to_a_limit_and_kept(told):
    screen = Screen()
    with Prints(told.append).taken(screen):
        for _ in range(400):
            print("x" * 999)
    assert len(screen.getvalue()) == 400_000
    assert len(told[-1].text) <= prints.MOST + 1_000


def test_a_bar_is_told_as_it_is_drawn(told):
    screen = Screen()
    with Prints(told.append).taken(screen):
        sys.stderr.write("\rtrain:  50%|#####     | 1/2 [00:01<00:01,  1.0it/s]")
        sys.stderr.write("\rtrain: 100%|##########| 2/2 [00:02<00:00,  1.0it/s]\n")
    assert [said.bar for said in told] == [("train", 1, 2), None]
    assert [said.text.startswith("train: 100%") for said in told] == [False, True]


def test_logging_is_taken_also_by_handlers_that_were_made_in_an_earlier_run(told, capsys):
    logger, first, second = logging.getLogger("of a hook"), Screen(), Screen()
    with Prints().taken(first):
        logger.addHandler(logging.StreamHandler())
        logger.warning("first")
    try:
        logger.warning("between")
        with Prints().taken(second):
            logger.warning("second")
    finally:
        logger.handlers.clear()
    assert first.getvalue() == "first\n"
    assert second.getvalue() == "second\n"
    assert capsys.readouterr().err == "between\n"


class Display:
    """Where displays go in this process: to the innermost block, as on an engine."""

    def __init__(self):
        self.takers = []

    def __call__(self, take):
        import contextlib

        self.takers.append(take)
        return contextlib.ExitStack()


def test_what_is_displayed_is_numbered_through_a_run_and_told_once(told):
    display, screens = Display(), (Screen(), Screen())
    taken = Prints(told.append, display)
    for screen, bundle in zip(screens, (RED, BLUE), strict=True):
        with taken.taken(screen):
            display.takers[-1](bundle)
    assert [screen.shown for screen in screens] == [{0: RED}, {1: BLUE}]
    assert [said.new for said in told] == [{0: RED}, {1: BLUE}]
    assert told[-1].text == RED.mark(0) + BLUE.mark(1)


def test_what_is_too_much_to_display_is_left_out_and_said_once(monkeypatch):
    monkeypatch.setattr(prints, "MOST_SHOWN", RED.nbytes)
    display, screen = Display(), Screen()
    with Prints(displays=display).taken(screen):
        for bundle in (RED, BLUE, BLUE):
            display.takers[-1](bundle)
    assert screen.shown == {0: RED}
    assert screen.getvalue().count("the rest is not displayed") == 1
