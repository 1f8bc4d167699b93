"""One site among ranks with the same rows, decided from shapes, from equality or from DTensors."""

from dataclasses import replace

import torch
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from flexmagic.engine.probe import note
from flexmagic.layout import decide
from flexmagic.layout.dims import Dim
from flexmagic.layout.seen import Distributed, Probe, WeightSplit
from flexmagic.layout.sites import Site

DIMS = (Dim("batch"), Dim("mlp", 4))
HALVES = (WeightSplit("a", 0, 4, (((0, 2),), ((2, 4),))),)
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def base(*ranks):
    return decide.Decision(ranks, DIMS, "float32")


def shapes(*tensors, groups=None, weights=HALVES):
    here = {rank: note(t, t) for rank, t in enumerate(tensors)}
    groups = groups or (0,) * len(tensors)
    probe = Probe(groups, (2,) * (max(groups) + 1), 8)
    return decide.from_shapes(base(*here), Site("a"), here, probe, weights)


def test_a_lone_rank_with_the_full_shape_holds_the_whole():
    assert shapes(X, weights=()).whole_everywhere
    assert shapes(torch.zeros(2, 4)).whole_everywhere


def test_zeros_are_a_whole_only_in_a_model_without_split_weights():
    zeros = torch.zeros(2, 4)
    assert shapes(zeros, zeros, weights=()).whole_everywhere
    assert shapes(zeros, zeros).refused == decide.ZERO
    assert shapes(zeros.long(), zeros.long()).refused == decide.ZERO  # the dtype is that of the site
    here = {rank: note(zeros.long(), zeros.long()) for rank in (0, 1)}
    whole = replace(base(0, 1), dtype="int64")
    assert decide.from_shapes(whole, Site("a"), here, Probe((0, 0), (2,)), HALVES).whole_everywhere


def test_what_differs_at_full_shape_or_follows_the_input_is_left_open():
    assert shapes(X, X + 1).open == -1
    rows = shapes(X[:1], X[1:])
    assert (rows.open, rows.places) == (0, {0: {0: 0, 1: 1}})
    assert rows.refused


def test_groups_that_hold_it_in_different_ways_are_refused():
    swapped = (WeightSplit("a", 0, 4, (((0, 2),), ((2, 4),), ((2, 4),), ((0, 2),))),)
    left, right = X[:, :2], X[:, 2:]
    found = shapes(left, right, left + 1, right + 1, groups=(0, 0, 1, 1), weights=swapped)
    assert "different ways" in found.refused
    assert "not so among all" in shapes(X, X, X, X + 1, groups=(0, 0, 1, 1)).refused


def say(tensors, placements, mesh_shape, whole, coordinates, *, ranks=None):
    said = (
        Distributed(placements, whole, mesh_shape, at, ranks[n] if ranks else tuple(range(len(tensors))))
        for n, at in enumerate(coordinates)
    )
    return {
        rank: replace(note(t, t), distributed=one)
        for rank, (t, one) in enumerate(zip(tensors, said, strict=True))
    }


GRID = [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_pieces_of_a_dtensor_are_numbered_in_the_order_of_its_cuts():
    parts = list(torch.randn(8, 1).split(2))
    plain = decide.from_distributed(base(0, 1, 2, 3), say(parts, (Shard(0), Shard(0)), (2, 2), (8, 1), GRID))
    assert plain.places == {0: {0: 0, 1: 1, 2: 2, 3: 3}}
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    strided = decide.from_distributed(base(0, 1, 2, 3), say(parts, placements, (2, 2), (8, 1), GRID))
    assert strided.places == {0: {0: 0, 1: 2, 2: 1, 3: 3}}
    odd = (_StridedShard(0, split_factor=3), Shard(0))
    assert (
        "not supported" in decide.from_distributed(base(0, 1), say(parts, odd, (2, 2), (8, 1), GRID)).refused
    )


def test_a_dtensor_may_be_sharded_and_summed():
    parts = list(torch.randn(4, 2, 4))
    found = decide.from_distributed(base(0, 1, 2, 3), say(parts, (Partial(), Shard(0)), (2, 2), (4, 4), GRID))
    assert found.places == {0: {0: 0, 1: 1, 2: 0, 3: 1}}
    assert found.addends == {0: 0, 1: 0, 2: 1, 3: 1}


def test_dtensors_of_ranks_with_other_rows_are_one_each():
    ranks = [(0, 1), (0, 1), (2, 3), (2, 3)]
    at = [(0,), (1,), (0,), (1,)]
    parts = [X[:, :2], X[:, 2:], X[:, :2] + 1, X[:, 2:] + 1]
    here = say(parts, (Shard(1),), (2,), (2, 4), at, ranks=ranks)
    found = decide.from_distributed(base(0, 1, 2, 3), here, (0, 0, 1, 1))
    assert found.places == {1: {0: 0, 1: 1, 2: 0, 3: 1}}
    assert not found.across_groups
    # with the same rows, the ranks of the other mesh would have to hold copies
    assert "and they do not" in decide.from_distributed(base(0, 1, 2, 3), here).refused
    copies = say([X, X, X + 1, X + 1], (Replicate(),), (2,), (2, 4), at, ranks=ranks)
    some = decide.from_distributed(base(0, 1, 2, 3), copies, (0, 1, 2, 3))
    assert "and not all of them" in some.refused
