"""What several people ask of the ranks at once goes there in one message, and comes back apart."""

import pytest

from flexmagic.client.gathering import Gathering, gathering
from flexmagic.client.turns import Turns
from flexmagic.engine.slot import Reply
from flexmagic.errors import EngineError, HookError


class Calls:
    """Answers each request with what it was asked for, and notes each message."""

    def __init__(self, gone=()):
        self.messages, self.gone = [], set(gone)
        self.ranks = self

    def refuse_if_ended(self, ranks):
        if self.gone & set(ranks):
            raise EngineError("gone")

    def some(self, requests):
        if (together := gathering(self)) is not None:
            return together.ask(requests)
        self.messages.append({rank: len(args[0]) for rank, (_, args, _) in requests.items()})
        return {rank: [self.one(rank, *each) for each in args[0]] for rank, (_, args, _) in requests.items()}

    def one(self, rank, verb, args, kwargs):
        if verb == "refuse":
            return Reply(error=HookError(f"no, {args[0]}"))
        if verb == "end":
            raise EngineError("gone")
        return Reply((rank, verb, *args, *kwargs.values()))


def asking(calls, out, who, *requests):
    def work():
        try:
            out[who] = [calls.some(each) for each in requests]
        except (HookError, EngineError) as error:
            out[who] = error

    return work


def test_each_gets_its_own_answers_and_rounds_go_together():
    calls, out = Calls(), {}
    Gathering(calls).do(
        [
            asking(calls, out, "ann", {0: ("read", (1,), {})}, {1: ("read", (2,), {"k": 3})}),
            asking(calls, out, "ben", {0: ("define", ("b",), {}), 1: ("define", ("b",), {})}),
            asking(calls, out, "cleo"),
        ]
    )
    assert out["ann"] == [{0: (0, "read", 1)}, {1: (1, "read", 2, 3)}]
    assert out["ben"] == [{0: (0, "define", "b"), 1: (1, "define", "b")}]
    assert out["cleo"] == []
    assert calls.messages == [{0: 2, 1: 1}, {1: 1}]


def test_what_one_is_refused_is_nobody_elses():
    calls, out = Calls(), {}
    Gathering(calls).do(
        [
            asking(calls, out, "ann", {0: ("refuse", ("ann",), {}), 1: ("refuse", ("ann",), {})}),
            asking(calls, out, "ben", {0: ("read", (1,), {})}),
        ]
    )
    assert str(out["ann"]) == "no, ann"
    assert out["ben"] == [{0: (0, "read", 1)}]


def test_an_engine_that_ends_is_everybodys():
    calls, out = Calls(), {}
    Gathering(calls).do(
        [
            asking(calls, out, "ann", {0: ("end", (), {})}),
            asking(calls, out, "ben", {0: ("read", (1,), {})}),
        ]
    )
    assert [type(out[who]) for who in ("ann", "ben")] == [EngineError, EngineError]


@pytest.mark.parametrize("others", [1, 0])
def test_who_asks_a_rank_that_has_ended_alone_hears_of_it(others):
    calls, out = Calls(gone=[1]), {}
    both = {0: ("read", (1,), {}), 1: ("read", (1,), {})}
    works = [asking(calls, out, "ann", both), asking(calls, out, "ben", {0: ("read", (1,), {})})]
    Gathering(calls).do(works[: 1 + others])
    assert type(out["ann"]) is EngineError
    assert out.get("ben") == ([{0: (0, "read", 1)}] if others else None)
    assert calls.messages == [{0: 1}] * others


def test_what_is_gathered_takes_no_turn_of_its_own(tmp_path):
    turns, refused = Turns(tmp_path / "turn"), []

    def work():
        with pytest.raises(RuntimeError, match="no turn of its own") as error, turns.turn():
            pytest.fail("each would wait for the other")
        refused.append(error)

    with turns.turn():
        Gathering(Calls()).do([work])
    assert len(refused) == 1


@pytest.mark.parametrize("count", [1, 30])
def test_any_number_of_them_ends(count):
    calls, out = Calls(), {}
    Gathering(calls).do([asking(calls, out, n, *[{0: ("read", (n,), {})}] * (n % 3)) for n in range(count)])
    assert {n: len(found) for n, found in out.items()} == {n: n % 3 for n in range(count)}
    assert gathering(calls) is None
