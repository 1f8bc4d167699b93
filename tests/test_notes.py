"""What is said after a run that went well: what is legal, but may surprise."""

import pytest

from flexmagic.client.notes import NEAR, RoomNotes, notes
from flexmagic.client.planning import Acting
from flexmagic.engine.captures import Room
from flexmagic.engine.code import HookSource
from flexmagic.engine.outcome import Edit, Outcome
from flexmagic.engine.runtime import RunReply
from flexmagic.layout.rule import Extent
from flexmagic.layout.sites import Site

SITE = Site("first")
HOOK = Acting(HookSource("damp", 1, "x *= 0.5"), (SITE,))


def reply(*, seconds=1.0, spent=None, printed=(), local=False, calls=1):
    outcome = Outcome(seconds={"damp": spent} if spent else {})
    outcome.calls[SITE] = calls
    outcome.edits = [Edit(str(SITE), "damp", edited=True, local=local)] * bool(calls)
    outcome.printed = [(str(SITE), "damp", text) for text in printed]
    return RunReply(outcome, {}, 0, seconds, Extent(1, 2, shared_out=False))


def said(*replies, hooks=(HOOK,)):
    return notes(hooks, [[each] for each in replies])


def test_of_a_hook_that_acts_nothing_is_said():
    assert said(reply(), reply()) == []


def test_a_hook_that_the_run_never_reached_is_named():
    assert said(reply(calls=0), reply(calls=0)) == [
        "hook 'damp' did not act: the run never reached first:output."
    ]


def test_a_slow_hook_is_named_with_what_the_slowest_rank_took():
    assert said(reply(seconds=4.0, spent=2.5), reply(seconds=4.0, spent=3.2)) == [
        "hook 'damp' was slow: its code took 3.2 s of the run's 4.0 s."
    ]
    assert said(reply(seconds=0.5, spent=0.4), reply(seconds=0.5, spent=0.4)) == [], "a short run"
    assert said(reply(seconds=9.0, spent=3.0), reply(seconds=9.0, spent=3.0)) == [], "not most of it"


def test_steps_of_a_generation_add_up():
    steps = [[reply(seconds=0.6, spent=0.5) for _ in range(4)] for _ in range(2)]
    assert notes((HOOK,), steps) == ["hook 'damp' was slow: its code took 2.0 s of the run's 2.4 s."]


def test_ranks_that_print_different_things_are_told_of():
    told = said(reply(printed=["mean 1\n"]), reply(printed=["mean 2\n"]))
    assert len(told) == 1
    assert told[0].startswith("hook 'damp' printed different things on the ranks at first:output")
    assert said(reply(printed=["same\n"]), reply(printed=["same\n"])) == []
    assert len(said(reply(printed=["only here\n"]), reply())) == 1


def test_pieces_and_the_speed_of_bars_may_differ():
    assert said(reply(printed=["a\n"], local=True), reply(printed=["b\n"], local=True)) == []
    bars = [f"100%|####| 4/4 [00:0{n}<00:00, {n}.0it/s]\n" for n in (1, 2)]
    assert said(reply(printed=bars[:1]), reply(printed=bars[1:])) == []


def test_a_rank_of_another_stage_does_not_print_and_is_not_odd():
    assert said(reply(printed=["mean 1\n"]), reply(calls=0)) == []


@pytest.fixture
def room():
    return RoomNotes()


def test_captures_near_their_budget_are_told_of_once(room):
    near = Room(int(NEAR * 1000), 1000)
    assert room.notes([Room(10, 1000), Room(20, 1000)]) == []
    (told,) = room.notes([Room(10, 1000), near])
    assert told.startswith("Captures on rank 1 hold 800 B of 1.0 kB")
    assert "%flexcluster limit --captures" in told
    assert room.notes([near, near]) == [], "it was said"
    assert room.notes([Room(10, 1000)] * 2) == []
    assert len(room.notes([near, near])) == 1, "there was room meanwhile"


def test_the_first_run_that_goes_for_another_is_told_of(room):
    (told,) = room.notes([Room(990, 1000, (3,)), Room(990, 1000, (3,))])
    assert told.startswith("The captures of run 3 were dropped to make room")
    assert room.notes([Room(990, 1000, (4,))] * 2) == []
    assert room.notes([Room(990, 1000)] * 2) == []
