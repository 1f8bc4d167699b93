"""Placements read off what ranks hold, and the order in which mesh axes cut a dim."""

import pytest
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from flexmagic.layout.layout import Layout, contiguous_spans
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.placement import Held, along_axes, cut_order, describe, dim_cut

MESH = Mesh(("a", "b"), (2, 2))


def held(*parts):
    return [None if part is None else Held(*part) for part in parts]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([((0, 0),)] * 4, (Replicate(), Replicate())),
        ([((0, 0),), ((0, 1),), ((0, 0),), ((0, 1),)], (Replicate(), Shard(1))),
        ([((0, 0),), ((0, 1),), ((1, 0),), ((1, 1),)], (Shard(0), Shard(1))),
        ([((0, 0),), ((1, 0),), ((2, 0),), ((3, 0),)], (Shard(0), Shard(0))),
        ([((0,), 0), ((0,), 1), ((1,), 0), ((1,), 1)], (Shard(0), Partial())),
        ([((0,), n) for n in range(4)], (Partial(), Partial())),
        ([None, None, ((0,),), ((0,),)], (None, Replicate())),
        ([None, None, ((0,),), ((1,),)], (None, Shard(0))),
        ([None, ((0,),), ((0,),), ((1,),)], (Shard(0), Shard(0))),
        ([((),)] * 4, (Replicate(), Replicate())),
    ],
)
def test_placements_are_read_off_the_parts(parts, expected):
    assert along_axes(MESH, held(*parts)) == expected


def test_an_axis_of_one_rank_copies():
    assert along_axes(Mesh(("a", "b"), (1, 2)), held(((0,),), ((1,),))) == (Replicate(), Shard(0))


def test_placements_in_words():
    words = [describe(p) for p in (Shard(1), Replicate(), Partial(), None)]
    assert words == ["Shard(dim=1)", "Replicate", "Partial(sum)", "on one stage"]


def test_a_layout_has_the_placements_of_its_blocks():
    blocks = tuple((rows, cols) for rows in contiguous_spans([2, 1]) for cols in contiguous_spans([4, 4]))
    layout = Layout((3, 8), ("row", "col"), "float32", MESH, blocks)
    assert layout.describe_placements() == ("a: Shard(dim=0)", "b: Shard(dim=1)")
    assert not layout.replicated
    summed = Layout((3, 8), ("row", "col"), "float32", MESH, (layout.whole_block,) * 4, (0, 1, 0, 1))
    assert summed.placements == (Replicate(), Partial())
    assert summed.partial
    assert summed.owners() == (0, 1)
    assert summed.owners(without=[1]) == (0, 3)


def strided(dim, factor):
    return _StridedShard(dim, split_factor=factor)


@pytest.mark.parametrize(
    ("placements", "shape", "order"),
    [
        ((Shard(0), Shard(0)), (2, 2), {0: [0, 1]}),
        ((Shard(1), Replicate(), Shard(0)), (2, 2, 2), {1: [0], 0: [2]}),
        ((strided(0, 4), Shard(0)), (2, 4), {0: [1, 0]}),
        ((Replicate(), strided(0, 2), Shard(0)), (2, 3, 2), {0: [2, 1]}),
        ((Shard(0), strided(0, 2), Shard(0)), (3, 4, 2), {0: [0, 2, 1]}),
        ((strided(0, 2), strided(0, 2), Shard(0)), (4, 3, 2), {0: [2, 0, 1]}),
        ((strided(0, 6), strided(0, 2), Shard(0)), (4, 3, 2), {0: [2, 1, 0]}),
        ((strided(0, 3), Shard(0)), (2, 2), None),
        ((strided(0, 2), Shard(0), Shard(0)), (2, 3, 3), None),
        ((strided(0, 2), Shard(1)), (2, 2), {1: [1], 0: [0]}),
        ((Partial(), Replicate()), (2, 2), {}),
    ],
)
def test_axes_cut_a_dim_in_the_order_that_torch_notes(placements, shape, order):
    assert cut_order(placements, shape) == order


def test_only_shards_cut():
    assert [dim_cut(p) for p in (Shard(1), strided(2, 2), Replicate(), Partial())] == [1, 2, None, None]
