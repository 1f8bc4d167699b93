"""Pictures side by side: facets, layers, pages, common colours; outliers in their very place."""

import numpy as np
import pytest

from flexmagic.view import scale as colors
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.caption import caption, probe, sheet_caption
from flexmagic.view.picture import ALONE, LAYERS, Look, compose
from flexmagic.view.pieces import split
from flexmagic.view.sheet import MOST_PANES, compose_sheet

TOKENS = ["When", " Mary", " went", "</script>", " home"]


def source(array, labels=None, **facts):
    return ArraySource(array, info_of(array, **facts), labels)


def pattern(heads=4, seq=5, **facts):
    """Attention of several heads, ``[batch, heads, seq, seq]``, the heads over two ranks."""
    x = np.random.default_rng(0).random((2, heads, seq, seq)).astype(np.float32)
    half = (heads // 2, heads - heads // 2)
    facts.setdefault("pieces", split(x.shape, 1, half))
    return x, source(x, {2: TOKENS[:seq], 3: TOKENS[:seq]}, dims=("batch", "heads", "seq", "seq"), **facts)


def test_attention_patterns_stand_side_by_side_by_head():
    x, one = pattern()
    sheet = compose_sheet(one, Look(fixed={0: 1}))
    assert [pane.title for pane in sheet.panes] == ["heads 0", "heads 1", "heads 2", "heads 3"]
    for head, pane in enumerate(sheet.panes):
        np.testing.assert_array_equal(pane.picture.tile, x[1, head])
        assert pane.picture.scale == sheet.lead.scale
        assert pane.picture.row_labels == pane.picture.col_labels
        assert [s.ranks for s in pane.picture.col_ribbon] == [(head // 2,)]
    assert one.bytes_moved == x[1].nbytes  # in one read, and nothing else
    said = sheet_caption(sheet)
    assert said[0].startswith("Side by side along heads: all 4. Rows seq[0:5], columns seq[0:5], batch[1].")
    assert "100 cells" in said[1]


def test_any_other_dim_can_be_side_by_side_and_impossible_ones_are_put_right():
    x, one = pattern()
    sheet = compose_sheet(one, Look(facet=0, fixed={1: 3}))
    assert [pane.title for pane in sheet.panes] == ["batch 0", "batch 1"]
    np.testing.assert_array_equal(sheet.panes[1].picture.tile, x[1, 3])
    for facet in (2, 3, 17, -7, LAYERS, ALONE):
        assert compose_sheet(one, Look(facet=facet)).facet == ALONE


def test_swapped_dims_are_swapped_in_every_picture():
    x, one = pattern()
    sheet = compose_sheet(one, Look(rows=3, cols=2, facet=1))
    for head, pane in enumerate(sheet.panes):
        np.testing.assert_array_equal(pane.picture.tile, x[0, head].T)


def test_many_facets_come_in_pages():
    x, one = pattern(heads=40)
    sheet = compose_sheet(one, Look(first=17))
    assert (sheet.first, len(sheet.panes), sheet.count) == (16, MOST_PANES, 40)
    np.testing.assert_array_equal(sheet.panes[1].picture.tile, x[0, 17])
    last = compose_sheet(one, Look(first=1000))
    assert (last.first, len(last.panes)) == (32, 8)
    assert "[32:40] of 40" in sheet_caption(last)[0]


def test_layers_stand_side_by_side_whatever_their_shapes():
    arrays = [np.full((3, 4), n, dtype=np.float32) for n in range(3)] + [np.ones((2, 2), np.float32)]
    layers = [(f"layer {n}", lambda a=a: source(a)) for n, a in enumerate(arrays)]
    sheet = compose_sheet(source(arrays[0]), Look(facet=LAYERS), layers)
    assert [pane.title for pane in sheet.panes] == ["layer 0", "layer 1", "layer 2", "layer 3"]
    for pane, array in zip(sheet.panes, arrays, strict=True):
        np.testing.assert_array_equal(pane.picture.tile, array)
    assert {pane.picture.scale.high for pane in sheet.panes} == {2.0}


def test_large_facets_are_overviews_with_common_colours():
    x = np.random.default_rng(0).normal(size=(3, 900, 2000)).astype(np.float32)
    x[1] *= 10
    sheet = compose_sheet(source(x), Look(facet=0))
    assert all(pane.picture.overview is not None for pane in sheet.panes)
    spread = [np.ptp(pane.picture.codes) for pane in sheet.panes]
    assert spread[1] > 3 * spread[0]
    values = sum(pane.picture.counts.values for pane in sheet.panes)
    assert f"of {values:,} values" in sheet_caption(sheet)[1]
    assert values == x.size


def test_a_missing_rank_is_a_hole_in_the_heads_it_owns():
    _, one = pattern(missing_ranks=(1,))
    sheet = compose_sheet(one, Look())
    lost = [bool((pane.picture.codes == colors.HOLE).all()) for pane in sheet.panes]
    assert lost == [False, False, True, True]


def needle():
    """Four million normal values, a step of half the scale in the left half, and one 1000."""
    x = np.random.default_rng(0).normal(size=(1, 1024, 4096)).astype(np.float32)
    x[..., :2048] += 2.5
    x[0, 777, 3001] = 1000
    return x, source(x, dims=("batch", "seq", "hidden"), pieces=split(x.shape, 2, (2048, 2048)))


@pytest.mark.parametrize("reducer", ["extremum", "mean", "rms"])
def test_a_needle_is_ringed_and_read_exactly_by_every_reducer(reducer):
    _, one = needle()
    picture = compose(one, Look(reducer=reducer))
    assert [(p.row, p.col, p.value) for p in picture.peaks] == [(777, 3001, 1000.0)]
    assert "Ringed: 1 value beyond 6 times" in caption(picture)[2]
    assert "the largest is 1000 at seq 777, hidden 3001" in caption(picture)[2]
    grid = picture.grid
    row = int(np.searchsorted(grid.row_edges, 777, side="right")) - 1
    col = int(np.searchsorted(grid.col_edges, 3001, side="right")) - 1
    text = probe(one, picture, row, col)
    assert "with 1000 at batch 0, seq 777, hidden 3001 (rank 1 at [0, 777, 953])" in text
    assert "with" not in probe(one, picture, row - 1, col)
    assert one.bytes_moved < 1_000_000


def test_a_step_of_half_the_scale_stays_visible_beside_the_needle():
    _, one = needle()
    codes = compose(one, Look()).codes.astype(int)
    half = codes.shape[1] // 2
    left, right = codes[:, : half - 1], codes[:, half + 1 :]
    assert left.mean() - right.mean() > 40
    assert np.quantile(left, 0.05) > np.quantile(right, 0.5)


def test_no_value_is_ringed_where_none_stands_out():
    x = np.random.default_rng(0).normal(size=(1000, 3000)).astype(np.float32)
    assert compose(source(x), Look()).peaks == ()
    assert len(caption(compose(source(x), Look()))) == 2


def test_more_outliers_than_are_named_are_said_to_be():
    x = np.zeros((1000, 3000), dtype=np.float32)
    x[::50, ::100] = -7
    picture = compose(source(x), Look())
    assert len(picture.peaks) == 32
    assert "(there may be more)" in caption(picture)[2]
