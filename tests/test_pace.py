"""How fast something goes on, and how long the rest will take."""

import pytest

from flexmagic.client.pace import Counted, Pace, span
from flexmagic.client.waiting import Waited


def after(*looks):
    pace = Pace()
    for now, far in looks:
        pace.see(now, far)
    return str(pace)


def test_a_pace_is_told_after_a_while():
    assert after((0.0, {0: ("w", 0, 40)}), (0.5, {0: ("w", 5, 40)})) == ""
    assert after((0.0, {0: ("w", 0, 40)}), (2.0, {0: ("w", 10, 40)})) == "5.0/s, 6 s left"
    assert after((1.0, {0: ("w", 0, 9)}), (5.0, {0: ("w", 2, 9)})) == "2.0 s each, 14 s left"


def test_the_rank_that_is_behind_counts():
    looks = [(0.0, {0: ("w", 0, 40), 1: ("w", 0, 20)}), (2.0, {0: ("w", 30, 40), 1: ("w", 5, 20)})]
    assert after(*looks) == "2.5/s, 6 s left"


def test_what_begins_anew_is_counted_anew():
    loading = [(0.0, {0: ("loading", 0, 40)}), (2.0, {0: ("loading", 40, 40)})]
    assert after(*loading, (2.1, {0: ("survey", 0, 8)})) == ""
    assert after(*loading, (2.1, {0: ("loading", 3, 40)})) == "", "a second bar of the same name"
    assert after((0.0, {})) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7325, "2 h 2 min")]
)
def test_spans(seconds, text):
    assert span(seconds) == text


def test_several_calls_are_counted_whatever_each_tells():
    told = []
    counted = Counted(told.append, "traces", 3)
    for counted.done in range(3):
        counted.heard(Waited(0.1, {0: ("of its own", 7, 9)}, {0: "printed\n"}))
    assert [str(waited) for waited in told] == [f"0.1 s: traces, {n}/3" for n in range(3)]
    assert told[0].printed == {0: "printed\n"}
    assert Counted(None, "traces", 3).heard is None


def test_how_far_ranks_are_is_one_number_if_it_is_the_same_and_else_that_of_the_last():
    assert str(Waited(3.2, {})) == "3.2 s"
    assert str(Waited(3.2, {0: ("w", 1, 2), 1: ("w", 1, 2)}, pace="1.0/s, 1 s left")) == (
        "3.2 s: w, 1/2, 1.0/s, 1 s left"
    )
    assert str(Waited(3.2, {0: ("w", 1, 2), 1: ("w", 0, 2)})) == "3.2 s: w, rank 0 1/2, rank 1 0/2"
    many = {rank: ("w", 64 - rank, 64) for rank in range(64)}
    assert str(Waited(3.2, many)) == "3.2 s: w, rank 60 4/64, rank 61 3/64, rank 62 2/64, rank 63 1/64"
    assert str(Waited(3.2, {0: ("w", 1, 2)}, bars={0: ("epoch", 3, 4)})) == "3.2 s: epoch, 3/4"
    assert "another notebook" in str(Waited(3.2, {}, turn=True))
