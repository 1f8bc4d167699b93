"""Verdicts from made-up looks at ranks."""

from dataclasses import replace

import pytest

from flexmagic.client.watching import SETTLED, SILENT, STILL, TimeLimits, Watcher
from flexmagic.engine.watch import (
    IDLE,
    MEETING,
    MODEL,
    OTHER,
    STIRRED,
    STIRRED_BESIDE,
    USER,
    Whereabouts,
)

MEETS = Whereabouts(MEETING, "all_reduce", "model.layers.2.mlp", asleep=True, locked=True)
LOOPS = Whereabouts(USER, "run", "model.layers.1.mlp:output", "bad", 3, "while True: pass")
INSIDE = Whereabouts(MODEL, "run", "model.layers.0", asleep=True, locked=True)


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


SIGNS = {"seconds": STIRRED, "beside": STIRRED_BESIDE, "moved": 1}
"""What shows that a rank does something, and how little of it is enough."""


@pytest.mark.parametrize("answered", [(), (2,)])
@pytest.mark.parametrize("sign", SIGNS)
def test_cpu_time_of_any_thread_and_bytes_are_signs_of_life(sign, answered):
    moving = [{0: MEETS, 1: replace(MEETS, **{sign: n * SIGNS[sign]})} for n in range(20)]
    assert looked(moving, answered=answered)[0] is None
    assert looked([*moving, *[moving[-1]] * 5], answered=answered)[0] is not None


def test_little_by_little_is_a_sign_of_life_too():
    """A slow backward, or a rank that hardly gets to run, does less than enough between any two looks."""
    slow = [{0: MEETS, 1: replace(INSIDE, seconds=n * STIRRED / 2)} for n in range(40)]
    assert looked(slow, every=0.1, settled=SETTLED, answered=(2,))[0] is None


def test_what_the_looks_themselves_cost_is_none():
    looks = [{0: replace(MEETS, beside=n * STIRRED_BESIDE / 20)} for n in range(10)]
    assert looked(looks)[0] is not None


AWAKE = [
    replace(MEETS, asleep=False, locked=False),  # it has work but no processor, or reads, or is swapped out
    replace(INSIDE, asleep=False, locked=False),
    replace(INSIDE, locked=False),  # it waits for a thread or a process of its own, which loads data
]


@pytest.mark.parametrize("answered", [(), (2,)])
@pytest.mark.parametrize("place", AWAKE)
def test_a_rank_that_does_not_sleep_for_others_is_waited_for(place, answered):
    looks = [{0: MEETS, 1: place}] * 100
    assert looked(looks, settled=SETTLED, answered=answered)[0] is None


def test_on_one_host_much_less_is_enough_once_a_rank_has_ended_its_part():
    verdict, looks = looked([{1: MEETS}] * 50, every=0.1, settled=SETTLED, answered=(0,))
    assert verdict.reason == "The ranks wait for each other in vain."
    assert SETTLED <= (looks - 1) * 0.1 < STILL / 2
    _, looks = looked([{1: MEETS}] * 50, every=0.1, settled=SETTLED)
    assert (looks - 1) * 0.1 >= STILL, "nobody has answered"
    _, looks = looked([{1: MEETS}] * 50, every=0.1, answered=(0,))
    assert (looks - 1) * 0.1 >= STILL, "between hosts bytes are under way unseen"


def test_stillness_before_an_answer_counts_for_nothing_after_it():
    """What the rank that answered sent last may not have woken up yet who waited for it."""
    watcher = Watcher(TimeLimits(), settled=SETTLED)
    for n in range(50):
        assert watcher.see(0.1 * n, (), {0: MEETS, 1: Whereabouts(MODEL, "run", "a")}) is None
    assert watcher.see(5.0, (1,), {0: MEETS}) is None
    assert watcher.see(5.2, (1,), {0: MEETS}) is None
    assert watcher.see(5.4, (1,), {0: MEETS}) is not None


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
