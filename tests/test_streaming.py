"""What ranks print while they run, shown once where they agree."""

import io
import sys

import pytest

from flexmagic.client.streaming import Streaming, drawn
from flexmagic.client.waiting import Waited
from flexmagic.engine import prints
from flexmagic.engine.prints import Prints


@pytest.fixture
def shown():
    return []


@pytest.fixture
def streaming(shown):
    return Streaming(shown.append, 2)


def test_lines_that_all_ranks_have_printed_are_shown_at_once_and_once(streaming, shown):
    streaming.hear({0: "a\nb\n"})
    assert shown == []
    streaming.hear({0: "a\nb\n", 1: "a\n"})
    streaming.hear({0: "a\nb\n", 1: "a\nb\n"})
    assert shown == ["a", "b"]
    streaming.end(["a\nb\nc", "a\nb\nc"])
    assert shown == ["a", "b", "c"]


def test_from_where_ranks_differ_each_is_shown_by_itself(streaming, shown):
    streaming.hear({0: "a\nmine\n", 1: "a\nyours\n"})
    streaming.end(["a\nmine\n", "a\nyours\n"])
    assert shown == ["a", "[rank 0] mine", "[rank 1] yours"]


def test_the_next_run_begins_anew(streaming, shown):
    streaming.hear({0: "a\n", 1: "a\n"})
    streaming.end(["a\n", "a\n"])
    streaming.end(["a\n", "a\n"])
    assert shown == ["a", "a"]


def test_nothing_printed_shows_nothing(streaming, shown):
    streaming.end(["", ""])
    assert shown == []


def test_progress_hears_the_same_beside_it(streaming, shown):
    heard = []
    waited = Waited(1.0, {}, {0: "a\n", 1: "a\n"})
    streaming.beside(heard.append)(waited)
    assert heard == [waited]
    assert shown == ["a"]
    assert streaming.beside(None) is None


def test_a_bar_that_was_drawn_over_itself_is_shown_as_it_ended():
    assert drawn("\r 0%|  |\r50%|# |\r100%|##|\ndone\n") == "100%|##|\ndone"


def test_a_rank_tells_whole_lines_and_keeps_everything(monkeypatch):
    monkeypatch.setattr(prints, "EVERY", 0.0)
    told, buffer = [], io.StringIO()
    with Prints(told.append).taken(buffer):
        print("one")
        print("half", end="")
        sys.stderr.write(" careful\n")
    assert told == ["one\n", "one\nhalf careful\n"]
    assert buffer.getvalue() == "one\nhalf careful\n"


def test_a_flood_is_told_up_to_a_limit_and_kept(monkeypatch):
    monkeypatch.setattr(prints, "EVERY", 0.0)
    told, buffer = [], io.StringIO()
    with Prints(told.append).taken(buffer):
        for _ in range(400):
            print("x" * 999)
    assert len(buffer.getvalue()) == 400_000
    assert len(told[-1]) <= prints.MOST + 1_000
