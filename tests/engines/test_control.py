"""Engines answer on their control channel whatever their main thread does."""

import json
import threading

import pytest
import torch

from flexmagic.client import control
from flexmagic.engine.watch import IDLE, MEETING, USER

from .fault_cases import IDS, MLP, MODEL, output

pytestmark = pytest.mark.engines
PATIENCE = 10.0


@pytest.fixture
def held(session, tmp_path):
    """A run in which rank 0 waits in C++ for a rank that runs user code, until the file ``go`` is there."""
    session.load(MODEL, tp=2)
    before = output(session)
    go, here = tmp_path / "go", tmp_path / "here"
    body = (
        "import os, torch.distributed as dist\n"
        f"open({str(here)!r} + str(rank), 'w').close()\n"
        f"while rank == 1 and not os.path.exists({str(go)!r}): pass"
    )
    session.hook(MLP, body, name="held")
    thread = threading.Thread(target=session.run, args=(IDS,))
    thread.start()
    yield session._calls.ranks.control
    go.touch()
    thread.join()
    assert torch.equal(output(session), before)


def looked(channel, wanted, line=None):
    """Look until both ranks are where the test needs them, rank 1 on a line of its hook."""
    while True:
        places = channel.look(range(2), PATIENCE)
        kinds = [place and place.kind for place in places.values()]
        if kinds == wanted and (line is None or places[1].line == line):
            return places


def test_a_rank_blocked_in_cpp_and_one_in_a_loop_say_where_they_are(held):
    places = looked(held, [MEETING, USER], line=3)
    assert (places[0].what, places[0].blocked) == ("all_reduce", True)
    assert places[1].hook == "held"
    assert json.dumps(places[1].plain())


def test_a_cut_without_any_ends_known_and_an_interrupt_of_nobody_do_nothing(held):
    looked(held, [MEETING, USER])
    said = held._ask([0], control.CUT, {"ranks": []}, PATIENCE)
    assert said[0]["shut"] == 0
    held.interrupt([], PATIENCE)


def test_an_idle_engine_says_so_and_is_not_interrupted(session):
    channel = session._calls.ranks.control
    assert looked(channel, [IDLE, IDLE])
    said = channel._ask(range(2), control.INTERRUPT, {}, PATIENCE)
    assert [content["sent"] for content in said.values()] == [False, False]


def test_a_question_that_cannot_be_answered_is_no_answer_and_no_harm(session):
    channel = session._calls.ranks.control
    assert channel._ask([0], control.CUT, {}, PATIENCE) == {0: None}
    assert looked(channel, [IDLE, IDLE])
