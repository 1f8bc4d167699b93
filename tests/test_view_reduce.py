"""Reductions against plain numpy: exact counts, merging over uneven pieces, numbers at the edges."""

import numpy as np
import pytest

from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.pieces import split
from flexmagic.view.reduce import (
    FLOAT32_MAX,
    compute_stats,
    local_edges,
    merge_overviews,
    merge_stats,
    reduce_overview,
)
from flexmagic.view.source import Source

SUBNORMAL = 1e-42


def awkward(shape=(7, 33), seed=0):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    x[0, 0] = np.nan
    x[0, 1] = -np.nan
    x[3, 9] = np.inf
    x[6, -1] = -np.inf
    x[2, 2] = -0.0
    x[2, 3] = SUBNORMAL
    return x


def naive(x, rows, cols):
    """Reduce bin by bin, in the plainest way there is."""
    out = {}
    for name, dtype in (("mean", "f4"), ("rms", "f4"), ("extremum", "f4"), ("n", "i4"), ("nan", "i4")):
        out[name] = np.zeros((len(rows) - 1, len(cols) - 1), dtype)
    for i in range(len(rows) - 1):
        for j in range(len(cols) - 1):
            part = x[rows[i] : rows[i + 1], cols[j] : cols[j + 1]].astype(np.float64)
            good = part[np.isfinite(part)]
            out["n"][i, j] = part.size
            out["nan"][i, j] = np.isnan(part).sum()
            if good.size:
                out["mean"][i, j] = good.mean()
                out["rms"][i, j] = np.sqrt((good**2).mean())
                out["extremum"][i, j] = max(good, key=lambda v: (abs(v), v))
    return out


def assert_same(overview, expected):
    for name, array in expected.items():
        got = getattr(overview, name)
        assert got.dtype == array.dtype, name
        np.testing.assert_allclose(got, array, rtol=1e-6, atol=0, err_msg=name)


def test_bins_are_reduced_as_by_hand():
    x, rows, cols = awkward(), np.array([0, 3, 7]), np.array([0, 8, 16, 24, 33])
    overview = reduce_overview(x, rows, cols)
    assert_same(overview, naive(x, rows, cols))
    assert overview.posinf.sum() == 1
    assert overview.neginf[1, 3] == 1
    assert overview.finite.sum() == x.size - 4


def test_a_window_leaves_out_what_is_around_it():
    x, rows, cols = awkward(), np.array([1, 2, 5]), np.array([4, 5, 20])
    assert_same(reduce_overview(x, rows, cols), naive(x, rows, cols))


@pytest.mark.parametrize("sizes", [(33,), (11, 11, 11), (10, 10, 10, 3), (2, 0, 30, 1)])
@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_merge_to_the_whole_wherever_bins_straddle_ranks(sizes, dim):
    x = awkward() if dim == 1 else awkward().T
    rows = np.array([0, 3, 7]) if dim == 1 else np.array([0, 8, 16, 24, 33])
    cols = np.array([0, 8, 16, 24, 33]) if dim == 1 else np.array([0, 3, 7])
    parts = []
    for piece in split(x.shape, dim, sizes):
        box = tuple(slice(*span) for span in piece.spans)
        parts.append(
            reduce_overview(x[box], local_edges(rows, *piece.spans[0]), local_edges(cols, *piece.spans[1]))
        )
    merged, whole = merge_overviews(parts), reduce_overview(x, rows, cols)
    for name in ("n", "nan", "posinf", "neginf", "extremum"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged.rms, whole.rms, rtol=1e-5)


def test_ties_and_emptiness_do_not_depend_on_the_order_of_ranks():
    edges = np.array([0, 2])
    left = reduce_overview(np.array([[-3.0, 1.0]]), np.array([0, 1]), edges)
    right = reduce_overview(np.array([[3.0, 1.0]]), np.array([0, 1]), edges)
    nothing = reduce_overview(np.array([[np.nan, np.inf]]), np.array([0, 1]), edges)
    for order in ([left, right, nothing], [nothing, right, left]):
        assert merge_overviews(order).extremum[0, 0] == 3.0
    assert (nothing.extremum[0, 0], nothing.mean[0, 0], nothing.finite[0, 0]) == (0, 0, 0)


def test_a_needle_survives_an_overview():
    x = np.random.default_rng(1).normal(size=(512, 1024)).astype(np.float32)
    x[300, 700] = -1000
    overview = reduce_overview(x, np.arange(0, 513, 16), np.arange(0, 1025, 16))
    assert overview.extremum.min() == -1000
    assert np.argmin(overview.extremum) == (300 // 16) * 64 + 700 // 16


@pytest.mark.parametrize(
    ("values", "extremum"),
    [
        (np.array([[True, False]]), 1),
        (np.array([[-7, 3]], dtype=np.int64), -7),
        (np.array([[3 + 4j, 1j]]), 5),
        (np.array([[1e300, 1.0]]), FLOAT32_MAX),
    ],
)
def test_every_dtype_has_an_extremum(values, extremum):
    overview = reduce_overview(values, np.array([0, 1]), np.array([0, 2]))
    assert overview.extremum[0, 0] == pytest.approx(extremum)


def test_edges_outside_are_refused():
    with pytest.raises(ValueError, match="must ascend within"):
        reduce_overview(np.zeros((2, 2)), np.array([0, 3]), np.array([0, 2]))
    with pytest.raises(ValueError, match="same bins"):
        merge_overviews([])


def test_statistics_count_exactly():
    stats = compute_stats(awkward())
    assert (stats.n, stats.nan, stats.posinf, stats.neginf, stats.zeros) == (231, 2, 1, 1, 1)
    good = awkward().astype(np.float64)
    good = good[np.isfinite(good)]
    assert stats.min == good.min()
    assert stats.mean == pytest.approx(good.mean())


def test_statistics_merge_without_losing_digits():
    x = np.random.default_rng(2).normal(1e6, 1e-3, 10_000)
    parts = [compute_stats(part) for part in np.split(x, [1, 4000, 4001])]
    merged = merge_stats([*parts, compute_stats(np.array([np.nan]))])
    assert merged.std == pytest.approx(x.std(), rel=1e-3)
    assert merged.nan == 1
    assert merged.n == 10_001
    assert np.isnan(merge_stats([compute_stats(np.array([np.nan]))]).mean)


def test_statistics_of_large_arrays_are_those_of_their_chunks():
    x = np.random.default_rng(3).normal(size=(3, 700_001)).astype(np.float32)
    x[1, 5], x[2, 7] = np.nan, -np.inf
    stats = compute_stats(x)
    good = x[np.isfinite(x)].astype(np.float64)
    assert (stats.n, stats.nan, stats.neginf) == (x.size, 1, 1)
    assert stats.mean == pytest.approx(good.mean(), rel=1e-9)
    assert stats.std == pytest.approx(good.std(), rel=1e-12)


def test_the_array_source_is_a_source_and_transposes():
    x = awkward()
    source = ArraySource(x[None], info_of(x[None], dims=("batch", "seq", "hidden")))
    assert isinstance(source, Source)
    rows, cols = np.array([0, 3, 7]), np.array([0, 8, 33])
    upright = source.overview(1, 2, {0: 0}, rows, cols)
    lying = source.overview(2, 1, {0: 0}, cols, rows)
    np.testing.assert_array_equal(upright.extremum, lying.extremum.T)
    one = ArraySource(x[1]).overview(-1, 0, {}, np.array([0, 1]), cols)
    np.testing.assert_array_equal(one.n, [[8, 25]])
    assert source.bytes_moved > 0


def test_what_only_missing_ranks_own_is_neither_reduced_nor_read():
    x = np.ones((4, 7), dtype=np.float32)
    info = info_of(x, pieces=split(x.shape, 1, (2, 2, 2, 1)), missing_ranks=(1,))
    source = ArraySource(x, info)
    assert source.stats().n == 20
    overview = source.overview(0, 1, {}, np.array([0, 4]), np.array([0, 2, 3, 5, 7]))
    np.testing.assert_array_equal(overview.n, [[8, 0, 4, 8]])
    assert np.isnan(source.read((0, slice(2, 4)))).all()
