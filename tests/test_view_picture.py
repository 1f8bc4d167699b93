"""The view-model without any browser: planes, scales, pictures, captions and read-outs."""

import numpy as np
import pytest

from flexmagic.view import scale as colors
from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.caption import caption, probe, tally
from flexmagic.view.layout import ticks
from flexmagic.view.picture import Look, compose
from flexmagic.view.pieces import split
from flexmagic.view.plane import MAX_BINS, Plane, cut, default_plane, make_plane
from flexmagic.view.source import Info

TOKENS = ["When", " Mary", " and", " John", " went", "\u202e", "</script>"]


def source(array, *, labels=None, **facts):
    return ArraySource(array, info_of(array, **facts), labels)


def activation(missing=()):
    x = np.random.default_rng(0).normal(size=(2, 7, 64)).astype(np.float32)
    return source(
        x,
        labels={1: TOKENS},
        site="model.layers.3.mlp:output",
        dims=("batch", "seq", "hidden"),
        pieces=split(x.shape, 2, (20, 20, 20, 4)),
        missing_ranks=missing,
    )


def info(shape, dims=None):
    return Info("m", shape, dims or tuple(f"d{i}" for i in range(len(shape))), "float32")


@pytest.mark.parametrize(
    ("shape", "dims", "plane"),
    [
        ((2, 16, 64), ("batch", "seq", "hidden"), (1, 2)),
        ((1, 4, 16, 16), ("batch", "heads", "seq", "seq"), (2, 3)),
        ((2, 16), ("batch", "seq"), (0, 1)),
        ((16, 2, 64), ("seq", "batch", "hidden"), (0, 2)),
        ((64, 32), ("out", "in"), (0, 1)),
        ((5,), ("hidden",), (-1, 0)),
        ((), (), (-1, -1)),
        ((2, 1, 3, 1, 2, 2, 3), None, (5, 6)),
    ],
)
def test_rows_and_columns_are_chosen_as_one_would(shape, dims, plane):
    chosen = default_plane(info(shape, dims))
    assert (chosen.rows, chosen.cols) == plane
    assert sorted(chosen.fixed) == [d for d in range(len(shape)) if d not in plane]


def test_impossible_planes_are_put_right():
    three = info((2, 16, 64), ("batch", "seq", "hidden"))
    assert make_plane(three, 7, 1, {}) == default_plane(three)
    assert make_plane(three, 1, 1, {}) == default_plane(three)
    assert make_plane(three, 2, 0, {1: 99}) == Plane(2, 0, {1: 15})


@pytest.mark.parametrize("size", [(7, 64), (2048, 4096), (1, 10**6), (10**6, 1), (300, 700)])
def test_grids_cover_the_window_and_stay_small(size):
    grid = cut((0, size[0]), (0, size[1]), (352, 728), 4)
    for edges, n in zip((grid.row_edges, grid.col_edges), size, strict=True):
        assert (edges[0], edges[-1]) == (0, n)
        assert (np.diff(edges) > 0).all()
        assert np.diff(edges).max() - np.diff(edges).min() <= 1
    assert grid.exact or grid.shape[0] * grid.shape[1] <= MAX_BINS
    assert grid.exact == (size[0] <= 352 and size[1] <= 728)


def test_limits_are_symmetric_for_signed_data_and_clip_only_what_is_far_out():
    x = np.random.default_rng(0).normal(size=10_000)
    plain = colors.fit(x, "linear")
    assert plain.low == -plain.high == -np.abs(x).max()
    x[17] = 1000
    robust = colors.fit(x, "linear")
    assert robust.high == pytest.approx(1.5 * np.quantile(np.abs(x), 0.995, method="higher"))
    assert (colors.encode(x, robust) == colors.OVER).sum() == 1
    everything = colors.fit(x, "symlog")
    assert everything.high == 1000
    assert not np.isin(colors.encode(x, everything), (colors.OVER, colors.UNDER)).any()


@pytest.mark.parametrize(
    ("values", "kind", "low", "high"),
    [
        ([0.0, 0.5, 1.0], "positive", 0, 1),
        ([0.95, 1.0, 1.05], "positive", 0.95, 1.05),
        ([-3.0, -1.0, 0.0], "negative", -3, 0),
        ([0.0, 0.0], "positive", 0, 1),
        ([5.0, 5.0], "positive", 0, 5),
        ([np.nan, np.inf], "positive", 0, 1),
        ([0.0] * 1000 + [7.0], "positive", 0, 7),
        ([-1e-42, 1e-42], "signed", -1e-42, 1e-42),
        ([-1.7e308, 1.7e308], "signed", -1.7e308, 1.7e308),
    ],
)
def test_limits_of_all_kinds_of_data(values, kind, low, high):
    scale = colors.fit(np.array(values), "linear")
    assert (scale.kind, scale.low, scale.high) == (kind, low, high)
    codes = colors.encode(np.array([low, high]), scale)
    assert list(codes) == [colors.FIRST, colors.LAST]


def test_marks_have_their_own_codes_and_colours():
    scale = colors.fit(np.array([-1.0, 1.0]), "linear")
    codes = colors.encode(np.array([np.nan, np.inf, -np.inf, 2, -2, 0, -0.0]), scale)
    assert list(codes[:5]) == [colors.NAN, colors.POSINF, colors.NEGINF, colors.OVER, colors.UNDER]
    assert codes[5] == codes[6] == (colors.FIRST + colors.LAST) // 2
    for kind in ("signed", "positive", "negative"):
        table = colors.palette(kind)
        assert table.shape == (256, 4)
        marks = [colors.UNDER, colors.OVER, colors.NAN, colors.POSINF, colors.NEGINF, colors.HOLE]
        ramp = {tuple(c) for c in table[colors.FIRST : colors.LAST + 1].tolist()}
        assert len({tuple(table[m].tolist()) for m in marks} - ramp) == len(marks)


def test_symlog_is_monotonic_and_its_colour_bar_says_its_values():
    x = np.concatenate([-np.logspace(3, -6, 50), np.logspace(-6, 3, 50)])
    scale = colors.fit(x, "symlog")
    assert (np.diff(colors.encode(x, scale).astype(int)) >= 0).all()
    assert colors.value_at(1, scale) == pytest.approx(1000)
    assert colors.value_at(0.5, scale) == pytest.approx(0)
    assert "linear below" in scale.text


def test_a_small_plane_is_drawn_one_to_one_and_read_exactly():
    one = activation()
    picture = compose(one, Look())
    assert picture.reducer == "1:1"
    assert picture.codes.shape == (7, 64)
    value = one.read((0, 1, 43))
    text = probe(one, picture, 1, 43)
    assert text == f'batch 0, seq 1 " Mary", hidden 43 = {value!s} \u2014 rank 2 at [0, 1, 3]'
    assert '"\\u202e"' in probe(one, picture, 5, 0)
    with pytest.raises(IndexError):
        probe(one, picture, 7, 0)


def test_windows_selectors_and_swapped_dims_read_the_right_cell():
    one = activation()
    x = one.read((slice(None),) * 3)
    look = Look(rows=2, cols=1, fixed={0: 1}, row_window=(40, 60), col_window=(2, 5))
    picture = compose(one, look)
    assert picture.codes.shape == (20, 3)
    np.testing.assert_array_equal(picture.tile, x[1, 2:5, 40:60].T)
    assert f"= {x[1, 3, 45]!s}" in probe(one, picture, 5, 1)
    assert "hidden[40:60] of 64" in caption(picture)[0]


def test_marks_and_clipping_are_always_counted():
    x = np.random.default_rng(0).normal(size=(10, 100)).astype(np.float32)
    assert tally(compose(source(x), Look())) == (
        "1,000 cells; clipped: 0 above, 0 below; NaN 0, +Inf 0, -Inf 0"
    )
    x[0, :3], x[1, :2], x[2, 0], x[3, 3], x[4, 4] = np.nan, np.inf, -np.inf, 1e6, -1e6
    picture = compose(source(x), Look())
    assert tally(picture) == "1,000 cells; clipped: 1 above, 1 below; NaN 3, +Inf 2, -Inf 1"
    assert (picture.codes == colors.NAN).sum() == 3


def test_an_overview_names_its_reducer_and_shows_the_needle():
    x = np.random.default_rng(0).normal(size=(2000, 3000)).astype(np.float32)
    x[1234, 567], x[10, 10] = 1000, np.nan
    big = source(x, dims=("seq", "hidden"), labels={0: [f"t{i}" for i in range(2000)]})
    picture = compose(big, Look())
    assert "signed extremum" in caption(picture)[0]
    (row,), (col,) = np.nonzero(picture.codes == colors.OVER)
    text = probe(big, picture, row, col)
    assert "extremum 1000" in text
    assert "rank 0" in text
    assert "NaN 1 in 1 cell" in caption(picture)[1]
    assert big.bytes_moved < 1_000_000
    moved = big.bytes_moved
    probe(big, picture, 0, 0)
    assert big.bytes_moved == moved
    mean = compose(big, Look(reducer="mean"))
    assert "is the mean" in caption(mean)[0]
    assert not np.isin(mean.codes, (colors.UNDER,)).any()


def test_held_limits_are_kept():
    picture = compose(activation(), Look(limits=(-0.5, 0.5)))
    assert (picture.scale.low, picture.scale.high) == (-0.5, 0.5)
    assert picture.counts.above > 0


def test_missing_ranks_are_holes_never_values():
    lost = activation(missing=(1,))
    picture = compose(lost, Look())
    assert (picture.codes[:, 20:40] == colors.HOLE).all()
    assert not (picture.codes[:, :20] == colors.HOLE).any()
    assert picture.counts.hole == 7 * 20
    assert picture.counts.nan == 0
    assert "missing 140" in tally(picture)
    assert "rank 1 missing" in probe(lost, picture, 0, 25)
    (hole,) = picture.holes
    assert (hole.cols, hole.text) == ((20, 40), "rank 1 missing")


def test_a_rank_that_dies_during_the_read_is_a_hole_too():
    class Dying(ArraySource):
        def read(self, index):
            out = super().read(index)
            self._info = activation(missing=(1,)).info
            return out * 0

    dying = Dying(activation().read((slice(None),) * 3), activation().info)
    assert (compose(dying, Look()).codes[:, 20:40] == colors.HOLE).all()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.array(3.25), "3.25"),
        (np.arange(5), "dim0 0 = 0"),
        (np.ones((3, 1, 2, 2, 2, 2, 3)), "dim6 0 = 1"),
        (np.array([[True, False]]), "= True"),
        (np.array([[2**60 + 1]]), "= 1152921504606846977"),
        (np.array([[3 + 4j]]), "= 3+4j"),
    ],
)
def test_every_form_of_tensor_has_a_picture(array, says):
    any_source = source(array)
    picture = compose(any_source, Look())
    assert says in probe(any_source, picture, 0, 0)
    if np.iscomplexobj(array):
        assert "Magnitudes of complex values" in caption(picture)[0]
        assert picture.scale.high == 5


def test_a_long_vector_is_an_overview_of_one_row():
    picture = compose(source(np.arange(100_000, dtype=np.float32)), Look())
    assert picture.codes.shape[0] == 1
    assert picture.overview.n.sum() == 100_000


def test_labels_follow_the_row_of_the_batch():
    x = np.zeros((2, 3, 4), dtype=np.float32)
    texts = source(x, dims=("batch", "seq", "hidden"), labels={1: [["a", "b", "c"], ["d", "e", "f"]]})
    assert compose(texts, Look()).row_labels == ("a", "b", "c")
    assert compose(texts, Look(fixed={0: 1})).row_labels == ("d", "e", "f")


@pytest.mark.parametrize("window", [(0, 7), (0, 4096), (17, 23), (1000, 1001)])
def test_ticks_lie_in_the_window_and_apart(window):
    found = ticks(window, 700, 56)
    assert all(window[0] <= at < window[1] for at in found)
    assert len(found) <= 700 / 56 + 1
