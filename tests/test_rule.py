"""A rule holds a run's local shapes to what the survey found."""

from dataclasses import replace

import pytest
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

from flexmagic.errors import LayoutError
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Extent, Rule, Split
from flexmagic.layout.sites import Site

DIMS = (Dim("batch"), Dim("seq"), Dim("mlp", 8))
MESH = Mesh(("dp", "tp"), (2, 2))
COLUMNS = Split(2, (0, 1, 0, 1), (((0, 4),), ((4, 8),)))
ROWS = Split(0, (0, 0, 1, 1), rows=True)


def rule(*splits, ranks=(0, 1, 2, 3), addends=(), mesh=MESH):
    return Rule(Site("a"), DIMS, "float32", mesh, ranks, splits, addends)


def test_rows_and_columns_of_any_length_make_the_whole():
    found = rule(COLUMNS, ROWS)
    assert found.placements == (Shard(0), Shard(2))
    assert not found.replicated
    layout = found.local_layout([(3, 7, 4), (3, 7, 4), (2, 7, 4), (2, 7, 4)])
    assert layout.shape == (5, 7, 8)
    assert layout.dims == ("batch", "seq", "mlp")
    assert layout.blocks[3] == (((3, 5),), ((0, 7),), ((4, 8),))
    assert [layout.local_shape(r) for r in range(4)] == [(3, 7, 4), (3, 7, 4), (2, 7, 4), (2, 7, 4)]


def test_where_the_rows_were_not_shared_out_the_groups_hold_copies():
    found = rule(COLUMNS, ROWS)
    layout = found.local_layout([(3, 7, 4)] * 4, Extent(shared_out=False))
    assert layout.shape == (3, 7, 8)
    assert layout.owners() == (0, 1)
    with pytest.raises(LayoutError, match="do not follow"):
        found.local_layout([(3, 7, 4), (3, 7, 4), (2, 7, 4), (2, 7, 4)], Extent(shared_out=False))


def test_pieces_without_fixed_places_follow_each_other_as_long_as_they_are():
    layout = rule(Split(1, (1, 0, 1, 0))).local_layout([(2, 4, 8), (2, 5, 8)] * 2)
    assert layout.shape == (2, 9, 8)
    assert [block[1] for block in layout.blocks[:2]] == [((5, 9),), ((0, 5),)]
    empty = rule(Split(1, (0, 1, 0, 1))).local_layout([(2, 4, 8), (2, 0, 8)] * 2)
    assert empty.shape == (2, 4, 8)
    assert empty.local_shape(1) == (2, 0, 8)


def test_interleaved_places_keep_their_spans():
    found = rule(Split(2, (0, 1, 0, 1), (((0, 2), (4, 6)), ((2, 4), (6, 8)))))
    assert found.local_layout([(1, 1, 4)] * 4).blocks[1][2] == ((2, 4), (6, 8))


def test_addends_and_ranks_that_hold_nothing_reach_the_layout():
    found = rule(ranks=(2, 3), addends=(0, 0, 0, 1))
    assert found.placements == (None, Partial())
    layout = found.local_layout([None, None, (1, 2, 8), (1, 2, 8)])
    assert layout.ranks == (2, 3)
    assert layout.owners() == (2, 3)
    assert layout.partial
    assert found.local_layout([(9, 9, 9), None, (1, 2, 8), (1, 2, 8)]).ranks == (2, 3)
    assert rule().placements == (Replicate(), Replicate())
    assert rule(ROWS).replicated


@pytest.mark.parametrize(
    ("splits", "local"),
    [
        ((), [(1, 2, 8)] * 3 + [(1, 3, 8)]),
        ((), [(1, 2, 7)] * 4),
        ((), [(1, 2)] * 4),
        ((COLUMNS,), [(1, 2, 4)] * 3 + [(1, 2, 3)]),
        ((COLUMNS,), [(1, 2, 5), (1, 2, 3)] * 2),
        ((COLUMNS, ROWS), [(1, 2, 4), (2, 2, 4), (1, 2, 4), (1, 2, 4)]),
        ((Split(1, (0, 1, 0, 1)),), [(1, 2, 8), (1, 2, 8), (1, 3, 8), (1, 2, 8)]),
        ((Split(1, (0, 2, 0, 2)),), [(1, 2, 8)] * 4),
        ((Split(1, (0, 1, 0, None)),), [(1, 2, 8)] * 4),
    ],
)
def test_shapes_that_do_not_follow_the_rule_are_refused(splits, local):
    with pytest.raises(LayoutError, match="do not follow the surveyed layout"):
        rule(*splits).local_layout(local)


def test_a_rank_that_never_came_is_named_and_a_refused_site_says_why():
    with pytest.raises(LayoutError, match="rank 1, 2 never reached"):
        rule().local_layout([(1, 2, 8), None, None, (1, 2, 8)])
    with pytest.raises(LayoutError, match="a:output is refused: of this"):
        replace(rule(), refused="of this").local_layout([(1, 2, 8)] * 4)


def test_a_rule_describes_itself():
    assert rule(COLUMNS, ROWS).describe() == "[batch, seq, mlp 8] dp: Shard(dim=0), tp: Shard(dim=2)"


def test_one_value_for_all_rows_may_become_one_for_each():
    """As of positions: whole where every rank has all rows, not known where rows are shared out."""
    found = replace(rule(), dims=(Dim("one", 1), Dim("seq"), Dim("mlp", 8)))
    assert found.local_layout([(1, 7, 8)] * 4, Extent(2, 7)).shape == (1, 7, 8)
    layout = found.local_layout([(2, 7, 8)] * 4, Extent(2, 7, shared_out=False))
    assert (layout.shape, layout.dims) == ((2, 7, 8), ("batch", "seq", "mlp"))
    with pytest.raises(LayoutError, match="do not follow"):
        found.local_layout([(3, 7, 8)] * 4, Extent(2, 7, shared_out=False))
    with pytest.raises(LayoutError, match="do not follow"):
        found.local_layout([(2, 7, 8)] * 4, Extent(4, 7))
    with pytest.raises(LayoutError, match="with position_ids each data group may have another"):
        found.local_layout([(1, 7, 8)] * 4, Extent(2, 7, by_row=("position_ids",)))


def test_dims_in_front_come_and_go_where_no_pieces_lie_along_them():
    found = rule(COLUMNS, ROWS)
    shorter, longer = found.moved(-1), found.moved(1)
    assert [dim.name for dim in shorter.dims] == ["seq", "mlp"]
    assert [(s.dim, s.spans) for s in shorter.splits] == [(1, COLUMNS.spans)]
    whole = Extent(shared_out=False)
    assert longer.local_layout([(5, 2, 7, 4)] * 4, whole).shape == (5, 2, 7, 8)
    assert found.moved(-3) is None
    assert rule().moved(-4) is None
