"""Settling what shapes leave open: the order along dims that follow the input, and sums."""

import torch

from flexmagic.engine.probe import note
from flexmagic.layout.decide import Decision
from flexmagic.layout.dims import Dim
from flexmagic.layout.seen import Probe
from flexmagic.layout.settle import settle
from flexmagic.layout.sites import Site

DIMS = (Dim("batch"), Dim("seq"), Dim("mlp", 4))
PIECE, WHOLE = Site("piece"), Site("whole")


def values(seed, seq=4):
    return torch.randn(2, seq, 4, generator=torch.Generator().manual_seed(seed))


def pieces_of(places, **more):
    return Decision(tuple(places), DIMS, "float32", {1: places}, open=1, refused="open", **more)


def settled(decision, per_rank, whole_per_rank, groups, whole_refused=""):
    whole = Decision(tuple(range(len(per_rank))), DIMS, "float32", refused=whole_refused)
    seen = [{PIECE: note(p, p), WHOLE: note(w, w)} for p, w in zip(per_rank, whole_per_rank, strict=True)]
    probe = Probe(groups, (2,) * (max(groups) + 1), 4)
    return settle({PIECE: decision, WHOLE: whole}, seen, probe)[PIECE]


def test_the_order_of_pieces_is_read_by_rank_however_the_places_are_listed():
    one, two = values(1), values(2)
    halves = [one[:, :2], two[:, :2], one[:, 2:], two[:, 2:]]
    places = {0: 0, 2: 1, 1: 0, 3: 1}  # group by group, and not in the order of the ranks
    decision = Decision((0, 1, 2, 3), DIMS, "float32", {1: places}, open=1, refused="open")
    found = settled(decision, halves, [one, two, one, two], (0, 1, 0, 1))
    assert found.refused == ""
    assert found.open is None
    assert "whole:output" in found.how


def test_every_group_must_have_its_positions_in_order():
    one, two = values(1), values(2)
    places = {0: 0, 1: 1, 2: 0, 3: 1}
    for halves in (
        [one[:, 2:], one[:, :2], two[:, :2], two[:, 2:]],
        [one[:, :2], one[:, 2:], two[:, 2:], two[:, :2]],
    ):
        found = settled(pieces_of(places), halves, [one, one, two, two], (0, 0, 1, 1))
        assert "out of order" in found.refused


def test_pieces_must_be_every_position_once():
    w = values(1)
    for own in ([0, 1], [1, 2]), ([0, 1], [2]), ([1, 2], [3]):
        found = settled(pieces_of({0: 0, 1: 1}), [w[:, at] for at in own], [w, w], (0, 0))
        assert "out of order" in found.refused


def test_a_refused_site_or_one_that_holds_other_rows_is_no_witness():
    w, other = values(1), values(2)
    halves = [w[:, :2], w[:, 2:]]
    assert settled(pieces_of({0: 0, 1: 1}), halves, [w, w], (0, 0)).refused == ""
    assert settled(pieces_of({0: 0, 1: 1}), halves, [w, w], (0, 0), "no").refused == "open"
    assert settled(pieces_of({0: 0, 1: 1}), halves, [other, other], (0, 0)).refused == "open"


def test_a_decision_that_is_made_stays():
    decision = Decision((0, 1), DIMS, "float32", refused="for good")
    w = values(1)
    assert settled(decision, [w, w], [w, w], (0, 0)) is decision


def test_addends_must_add_up_in_every_group():
    a, b, c, d = (values(n) for n in range(4))
    decision = Decision((0, 1, 2, 3), DIMS, "float32", open=-1, refused="open")
    groups = (0, 0, 1, 1)
    found = settled(decision, [a, b, c, d], [a + b, a + b, c + d, c + d], groups)
    assert found.addends == {0: 0, 1: 1, 2: 0, 3: 1}
    assert settled(decision, [a, b, c, d], [a + b, a + b, c - d, c - d], groups).refused == "open"


def test_a_sum_may_be_held_with_rows_and_positions_in_two_dims_instead_of_one():
    a, b = values(1), values(2)
    flat = (Dim("batch·seq"), DIMS[2])

    def found(whole, whole_dims=DIMS):
        decided = {
            PIECE: Decision((0, 1), flat, "float32", open=-1, refused="open"),
            WHOLE: Decision((0, 1), whole_dims, "float32"),
        }
        seen = [{PIECE: note(p.flatten(0, 1), p), WHOLE: note(whole, whole)} for p in (a, b)]
        return settle(decided, seen, Probe((0, 0), (2,), 4))[PIECE]

    assert found(a + b).addends == {0: 0, 1: 1}
    assert found(a - b).refused == "open"
    assert found((a + b).transpose(0, 1), (DIMS[1], DIMS[0], DIMS[2])).refused == "open"
    assert found((a + b).transpose(0, 1)).refused == "open"
