"""Whose turn it is at a gateway's desk: runs in large batches, looks in between, nobody for ever."""

from types import SimpleNamespace

import pytest

from flexmagic.workshop import desk as desk_module
from flexmagic.workshop.desk import Desk, Job
from flexmagic.workshop.requests import parse


@pytest.fixture
def clock(monkeypatch):
    """A time that goes on when it is told to; nothing waits."""
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(desk_module.time, "monotonic", lambda: now.value)
    monkeypatch.setattr(desk_module, "LINGER", 0)
    return now


@pytest.fixture
def desk(clock):
    """One that takes four runs or looks at a time, and does nothing by itself."""
    made = Desk(lambda _jobs: None, lambda _a, _b: True, lambda: 4, lambda: None)
    made.clock = clock
    return made


def add(desk, kind, *names):
    for name in names:
        fields = {"run": {"inputs": "x"}, "look": {"run": 1, "site": "m"}}[kind]
        assert desk.add(Job(SimpleNamespace(name=name), kind, parse(kind, fields, [])))


def taken(desk):
    jobs = desk._take()
    return (jobs[0].kind, "".join(job.guest.name for job in jobs)) if jobs else None


def done(desk, seconds=1.0):
    """Note that runs were done, which took so long."""
    desk._mean = seconds
    desk._note_runs()


def test_a_batch_goes_before_looks_that_came_later(desk):
    add(desk, "look", "x")
    done(desk)
    add(desk, "run", *"abcde")
    assert taken(desk) == ("look", "x"), "it waited when the last runs were done"
    add(desk, "look", "y")
    assert taken(desk) == ("run", "abcd")
    done(desk)
    assert taken(desk) == ("look", "y")
    assert taken(desk) == ("run", "e")


def test_few_runs_give_way_to_looks_but_not_for_longer_than_runs_take(desk):
    done(desk, seconds=1.0)
    add(desk, "run", "a")
    for name in "xyz":
        add(desk, "look", name)
        assert taken(desk) == ("look", name)
        desk.clock.value += 0.3
    add(desk, "look", "z")
    desk.clock.value += 0.3
    assert taken(desk) == ("run", "a")


def test_many_looks_do_not_keep_a_batch_waiting_for_longer_than_it_takes(desk):
    add(desk, "look", *"stuvwxyz")
    done(desk, seconds=1.0)
    add(desk, "run", *"abcd")
    assert taken(desk) == ("look", "stuv")
    desk.clock.value += 1.1
    assert taken(desk) == ("run", "abcd")
    assert taken(desk) == ("look", "wxyz")


def test_while_it_is_paused_only_looks_have_turns(desk):
    desk.pause(paused=True)
    add(desk, "run", *"abcd")
    add(desk, "look", "x")
    assert taken(desk) == ("look", "x")
    desk.pause(paused=False)
    assert taken(desk) == ("run", "abcd")
