"""Verdicts from made-up looks at ranks."""

import pytest

from flexmagic.client.watching import SILENT, STILL, TimeLimits, Watcher
from flexmagic.engine.watch import IDLE, MEETING, MODEL, OTHER, USER, Whereabouts

MEETS = Whereabouts(MEETING, "all_reduce", "model.layers.2.mlp", locked=True)
LOOPS = Whereabouts(USER, "run", "model.layers.1.mlp:output", "bad", 3, "while True: pass")
INSIDE = Whereabouts(MODEL, "run", "model.layers.0", locked=True)


def looked(looks, limits=None, answered=(), every=0.4, **options):
    """The first verdict over looks, each a dict of places, and how many it took."""
    watcher = Watcher(limits or TimeLimits(), **options)
    for number, places in enumerate(looks):
        verdict = watcher.see(0.4 + every * number, answered, places)
        if verdict is not None:
            return verdict, number + 1
    return None, len(looks)


def test_ranks_that_all_wait_and_do_nothing_wait_in_vain():
    verdict, looks = looked([{0: MEETS, 1: INSIDE}] * 10)
    assert verdict.reason == "The ranks wait for each other in vain."
    assert (looks - 1) * 0.4 >= STILL
    assert str(verdict).splitlines()[1:] == [
        "  rank 0: waiting for other ranks in all_reduce at model.layers.2.mlp",
        "  rank 1: in the model at model.layers.0",
    ]


def test_two_looks_are_never_enough():
    assert looked([{0: MEETS}] * 2, every=60.0)[0] is None
    assert looked([{0: MEETS}] * 3, every=60.0)[0] is not None


@pytest.mark.parametrize("sign", ["seconds", "moved"])
def test_cpu_time_or_bytes_are_signs_of_life(sign):
    moving = [{0: MEETS, 1: Whereabouts(MEETING, "all_reduce", **{sign: n})} for n in range(20)]
    assert looked(moving)[0] is None
    assert looked([*moving, *[moving[-1]] * 5])[0] is not None


@pytest.mark.parametrize(
    "place",
    [
        Whereabouts(MODEL, "load_model", locked=True),  # other threads read the weights
        Whereabouts(MODEL, "run", "model.layers.0"),  # it computes
        Whereabouts(OTHER, "cell.py, line 3"),
    ],
)
def test_ranks_that_wait_for_no_other_are_left_alone(place):
    assert looked([{0: place, 1: place}] * 100)[0] is None


def test_a_rank_whose_others_have_ended_waits_in_vain():
    verdict, _ = looked([{1: MEETS}] * 10, answered=(0,))
    assert verdict.answered == {0}
    assert "  rank 0: has ended its part" in str(verdict)
    assert "rank 0" not in verdict.meanwhile
    assert verdict.meanwhile.startswith("Meanwhile:\n  rank 1: waiting")


def test_user_code_that_others_wait_for_has_a_limit_of_its_own():
    limits = TimeLimits(alone=5.0)
    verdict, looks = looked([{0: MEETS, 1: LOOPS}] * 50, limits)
    assert verdict.guilty == (1,)
    assert verdict.reason == "The other ranks wait for rank 1, which has been in user code for over 5 s."
    assert (looks - 1) * 0.4 > 5.0
    assert "rank 1: in hook 'bad', line 3, at model.layers.1.mlp:output\n      while True" in str(verdict)
    assert looked([{1: LOOPS}] * 50, limits, answered=(0,))[0].guilty == (1,)


def test_user_code_on_all_ranks_has_no_limit_but_that_of_the_call():
    assert looked([{0: LOOPS, 1: LOOPS}] * 100, TimeLimits(alone=1.0))[0] is None
    verdict, _ = looked([{0: LOOPS, 1: LOOPS}] * 100, TimeLimits(run=8.0))
    assert verdict.reason == "The call took longer than its limit of 8 s."


def test_the_clock_of_user_code_starts_anew_at_the_next_site():
    elsewhere = Whereabouts(USER, "run", "model.layers.3.mlp:output", "bad", 3)
    looks = [{0: MEETS, 1: place} for place in [LOOPS, elsewhere] * 20]
    assert looked(looks, TimeLimits(alone=1.0))[0] is None


def test_a_look_without_an_answer_does_not_start_the_clock_anew():
    looks = [{0: MEETS, 1: place} for place in [LOOPS, LOOPS, None] * 10]
    verdict, _ = looked(looks, TimeLimits(alone=2.0))
    assert verdict.guilty == (1,)


def test_a_rank_that_stays_silent_counts_as_frozen():
    verdict, looks = looked([{0: MEETS, 1: None}] * 50)
    assert verdict.reason == "The other ranks wait for rank 1, which does not answer."
    assert (looks - 1) * 0.4 > SILENT
    assert "does not answer (stopped" in str(verdict)
    assert looked([{0: MEETS, 1: None}] * 50, silent=60.0)[0] is None


def test_all_ranks_silent_tell_nothing():
    assert looked([{0: None, 1: None}] * 100)[0] is None


def test_an_idle_rank_that_has_yet_to_begin_is_waited_for():
    assert looked([{0: MEETS, 1: Whereabouts(IDLE)}] * 100)[0] is None
