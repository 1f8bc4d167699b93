"""Freeing ranks step by step, with a made-up control; joining what ranks say of their groups."""

import os
import signal
import threading

import pytest

from flexmagic.client import recovery
from flexmagic.client.recovery import Freed, free, meeting_at, postponed, together, uninterrupted
from flexmagic.engine.private_groups import GroupSpec
from flexmagic.engine.watch import IDLE, USER, Whereabouts
from flexmagic.errors import ClusterError


class Ranks:
    """Ranks of which each comes back at a cut, at an interrupt, at its end, or not at all.

    ``coding``: those in the user's code, from a number of looks on.
    """

    def __init__(self, coding=(), begins=1, **frees):
        self.coding, self.begins, self.looks = coding, begins, 0
        self.frees = {int(rank.removeprefix("rank")): by for rank, by in frees.items()}
        self.done = []

    def cut(self, ranks, _patience):
        self._happens("cut", ranks)

    def look(self, ranks, _patience):
        self.looks += 1
        user = Whereabouts(USER, "run", "a:output", "bad", 3) if self.looks >= self.begins else None
        return {rank: (user or Whereabouts(IDLE)) if rank in self.coding else None for rank in ranks}

    def interrupt(self, ranks, _patience):
        if ranks:
            self._happens("interrupt", ranks)

    def end(self, rank):
        self._happens("end", [rank])

    def _happens(self, what, ranks):
        self.done.append((what, tuple(ranks)))
        self.frees = {r: by for r, by in self.frees.items() if by != what or r not in ranks}

    def waiting(self):
        return list(self.frees)


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(recovery, "AT_ONCE", 0.01)
    monkeypatch.setattr(recovery, "AGAIN", 0.03)
    monkeypatch.setattr(recovery, "FREED", 0.02)
    monkeypatch.setattr(recovery, "STUCK", 0.2)


def freed(ranks):
    return free(ranks, ranks.waiting, range(3), ranks.end)


def test_ranks_that_come_back_when_cut_are_left_alone():
    ranks = Ranks(rank0="cut", rank2="cut")
    assert freed(ranks) == Freed()
    assert ranks.done == [("cut", (0, 1, 2))]


def test_only_ranks_that_are_still_out_are_interrupted():
    ranks = Ranks(rank0="cut", rank1="interrupt")
    assert freed(ranks) == Freed(interrupted=(1,))
    assert ranks.done == [("cut", (0, 1, 2)), ("interrupt", (1,))]


def test_user_code_is_interrupted_without_waiting_for_what_a_cut_frees():
    ranks = Ranks(coding=(1,), rank0="interrupt", rank1="interrupt", rank2="cut")
    assert freed(ranks) == Freed(interrupted=(0, 1))
    assert ranks.done == [("cut", (0, 1, 2)), ("interrupt", (1,)), ("interrupt", (0,))]


def test_a_rank_that_begins_late_is_interrupted_once_it_has():
    ranks = Ranks(coding=(1,), begins=3, rank1="interrupt")
    assert freed(ranks) == Freed(interrupted=(1,))
    assert ranks.done == [("cut", (0, 1, 2)), ("interrupt", (1,))]


def test_only_ranks_that_nothing_frees_are_ended():
    ranks = Ranks(rank0="interrupt", rank1="end", rank2="cut")
    assert freed(ranks) == Freed(interrupted=(0,), ended=(1,))
    assert ranks.done[-1] == ("end", (1,))
    assert len(ranks.done) == 3


def spec(name, *ranks):
    return GroupSpec(name, ranks, "gloo", "")


def test_groups_of_all_ranks_once_each_in_the_order_in_which_they_were_made():
    told = [
        [spec("1", 0, 1, 2), spec("10", 0, 1)],
        [spec("2", 1, 2), spec("10", 0, 1), spec("1", 0, 1, 2)],
        [],
    ]
    assert [group.name for group in together(told)] == ["1", "2", "10"]
    named = together([[spec("mesh", 0), spec("3", 0)]])
    assert [group.name for group in named] == ["3", "mesh"]


def test_different_groups_of_one_name_are_refused():
    with pytest.raises(ClusterError, match="do not have the same process group 2"):
        together([[spec("2", 0, 1)], [spec("2", 1, 0)]])


def test_a_meeting_is_of_the_generation_after_all_that_ranks_know():
    assert meeting_at("host", 5, {}).generation == 1
    assert meeting_at("host", 5, {0: 3, 1: 4}).generation == 5
    assert (meeting_at("host", 5, {}).host, meeting_at("host", 5, {}).port) == ("host", 5)


def test_a_recovery_is_not_interrupted_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    with uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(RuntimeError), uninterrupted():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_of_what_is_done_whole_comes_at_its_end():
    before, done = signal.getsignal(signal.SIGINT), []

    def interrupted():
        with postponed():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("whole")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["whole"]
    assert signal.getsignal(signal.SIGINT) is before
    with postponed():
        done.append("and without")
    with pytest.raises(RuntimeError), postponed():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_signals_alone():
    inside = []

    def work():
        with uninterrupted():
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [signal.getsignal(signal.SIGINT)]
