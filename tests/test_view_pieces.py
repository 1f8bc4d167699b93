"""Who owns what: masks, owners, ribbons and holes."""

import time

import numpy as np
import pytest

from flexmagic.view.pieces import owners, present, split
from flexmagic.view.plane import Plane, default_plane
from flexmagic.view.ribbon import holes, ink, ribbons
from flexmagic.view.source import Info, Piece

SHAPE = (2, 16, 7)
DIMS = ("batch", "seq", "hidden")


def info(pieces=(), missing=()):
    return Info("m", SHAPE, DIMS, "float32", pieces=tuple(pieces), missing_ranks=missing)


def uneven(missing=()):
    return info(split(SHAPE, 2, (2, 2, 2, 1)), missing)


def test_uneven_pieces_have_their_owner_and_local_index():
    assert owners(uneven(), (1, 3, 6)) == ((3, (1, 3, 0)),)
    assert owners(uneven(), (0, 0, 3)) == ((1, (0, 0, 1)),)


def test_replicas_and_several_boxes_of_a_rank_are_all_named():
    whole = tuple((0, n) for n in SHAPE)
    both = info([Piece(1, whole), Piece(0, whole)])
    assert [rank for rank, _ in owners(both, (0, 0, 0))] == [0, 1]
    second = Piece(0, ((0, 2), (0, 16), (5, 7)), local=(0, 0, 3))
    assert owners(info([second]), (1, 2, 6)) == ((0, (1, 2, 4)),)


def test_the_mask_has_the_shape_of_the_slice():
    mask = present(uneven(missing=(1,)), (0, slice(0, 3), slice(1, 5)))
    np.testing.assert_array_equal(mask, [[True, False, False, True]] * 3)
    assert present(uneven(), (0, slice(None), slice(None))) is None
    assert present(uneven(missing=(1,)), (0, 0, slice(4, 7))) is None
    assert not present(uneven(missing=(1,)), (0, 0, 2))


def test_a_replica_that_answers_leaves_no_hole():
    whole = tuple((0, n) for n in SHAPE)
    both = info([Piece(0, whole), Piece(1, whole)], missing=(1,))
    assert present(both, (0, slice(None), slice(None))) is None
    assert holes(both, default_plane(both)) == ()


def test_ribbon_is_proportional_to_uneven_pieces():
    cols, rows = ribbons(uneven(), default_plane(uneven()))
    assert [(s.start, s.stop, s.ranks) for s in cols] == [
        (0, 2, (0,)),
        (2, 4, (1,)),
        (4, 6, (2,)),
        (6, 7, (3,)),
    ]
    assert [s.color for s in cols] == [0, 1, 2, 3]
    assert rows == ()


def test_a_split_selector_names_who_owns_what_is_shown():
    split_batch = info(split(SHAPE, 0, (1, 1)))
    (only,), rows = ribbons(split_batch, Plane(1, 2, {0: 1}))
    assert (only.ranks, only.text, rows) == ((1,), "rank 1", ())


def test_two_split_dims_have_two_ribbons_that_name_all_owners():
    pieces = [
        Piece(2 * i + j, ((0, 2), rows, cols))
        for i, rows in enumerate(((0, 8), (8, 16)))
        for j, cols in enumerate(((0, 4), (4, 7)))
    ]
    cols, rows = ribbons(info(pieces), Plane(1, 2, {0: 0}))
    assert [s.ranks for s in cols] == [(0, 2), (1, 3)]
    assert [s.ranks for s in rows] == [(0, 1), (2, 3)]
    (hole,) = holes(info(pieces, missing=(3,)), Plane(1, 2, {0: 0}))
    assert (hole.rows, hole.cols, hole.text) == ((8, 16), (4, 7), "rank 3 missing")


def test_partly_replicated_boxes_leave_only_the_rest_as_a_hole():
    pieces = [Piece(0, ((0, 2), (0, 16), (0, 4))), Piece(1, ((0, 2), (0, 16), (2, 7)))]
    (hole,) = holes(info(pieces, missing=(1,)), Plane(1, 2, {0: 0}))
    assert hole.cols == (4, 7)


def test_thousands_of_interleaved_stretches_are_quick_and_neighbours_join():
    whole = ((0, 2), (0, 16))
    shape = (2, 16, 8192)
    pieces = [Piece(c // 2 % 2, (*whole, (c, c + 1)), (0, 0, c // 2)) for c in range(8192)]
    many = Info("m", shape, DIMS, "float32", pieces=tuple(pieces))
    start = time.process_time()
    cols, _ = ribbons(many, Plane(1, 2, {0: 0}))
    assert time.process_time() - start < 1  # of this process alone: eight hundredths are usual
    assert [(s.start, s.stop, s.ranks) for s in cols[:2]] == [(0, 2, (0,)), (2, 4, (1,))]
    assert len(cols) == 4096


def test_missing_ranks_are_named_in_the_ribbon():
    cols, _ = ribbons(uneven(missing=(3,)), default_plane(uneven()))
    assert cols[3].text == "rank 3 missing"


@pytest.mark.parametrize("color", range(8))
def test_rank_numbers_are_readable_on_their_colour(color):
    def light(rgb):
        c = [v / 255 for v in rgb]
        c = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in c]
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]

    from flexmagic.view.ribbon import fill

    low, high = sorted((light(ink(color)), light(fill(color))))
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_impossible_layouts_are_refused():
    with pytest.raises(ValueError, match="dim names"):
        Info("m", (2, 3), ("seq",), "float32")
    with pytest.raises(ValueError, match="outside"):
        Info("m", (2,), ("seq",), "float32", pieces=(Piece(0, ((0, 3),)),))
    with pytest.raises(ValueError, match="add up"):
        split((7,), 0, (2, 2))
