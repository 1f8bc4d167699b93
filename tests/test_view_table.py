"""Statistics by rank: merged to the whole, on shared bins; replicas that agree or not; summands."""

import numpy as np
import pytest

from flexmagic.view.arrays import ArraySource, info_of
from flexmagic.view.caption import probe
from flexmagic.view.picture import Look, compose
from flexmagic.view.pieces import split
from flexmagic.view.reduce import compute_stats, count_between
from flexmagic.view.source import ByRank, Piece
from flexmagic.view.table import agreement, bars, disagreements, rank_table

SHAPE = (6, 7)


def awkward():
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    x[0, 0], x[1, 3], x[2, 6], x[3, 3], x[4, 4] = np.nan, np.inf, -np.inf, -0.0, 1e-42
    return x


def sharded(sizes=(2, 2, 2, 1), missing=()):
    x = awkward()
    return x, ArraySource(x, info_of(x, pieces=split(SHAPE, 1, sizes), missing_ranks=missing))


def replicas(*arrays, **facts):
    whole = tuple((0, n) for n in arrays[0].shape)
    pieces = tuple(Piece(rank, whole) for rank in range(len(arrays)))
    return ArraySource(arrays[0], info_of(arrays[0], pieces=pieces, **facts), held=dict(enumerate(arrays)))


def summands(*arrays):
    total = np.sum(arrays, axis=0)
    whole = tuple((0, n) for n in total.shape)
    pieces = tuple(Piece(rank, whole, (), rank) for rank in range(len(arrays)))
    return ArraySource(total, info_of(total, pieces=pieces, partial=True), held=dict(enumerate(arrays)))


@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (7, 0), (0, 3, 4)])
def test_the_whole_is_merged_from_what_the_ranks_hold(sizes):
    x, one = sharded(sizes)
    assert isinstance(one, ByRank)
    table = rank_table(one)
    whole, *ranks = table.rows
    truth = compute_stats(x)
    for name in ("n", "nan", "posinf", "neginf", "zeros", "min", "max"):
        assert getattr(whole.stats, name) == getattr(truth, name), name
    assert whole.stats.mean == pytest.approx(truth.mean)
    assert whole.stats.std == pytest.approx(truth.std)
    start = 0
    for row, size in zip(ranks, sizes, strict=True):
        part = x[:, start : start + size]
        start += size
        assert row.stats.n == part.size
        assert row.stats.nan == np.isnan(part).sum()
        np.testing.assert_array_equal(row.counts, count_between(part, table.edges))
    np.testing.assert_array_equal(whole.counts, sum(row.counts for row in ranks))
    assert whole.counts.sum() + whole.outside == np.isfinite(x).sum()


def test_one_huge_value_does_not_empty_the_histogram():
    y = np.random.default_rng(0).normal(size=(1000, 4000))
    y[3, 3] = 1000
    whole = rank_table(ArraySource(y)).rows[0]
    assert whole.outside == 1
    assert (whole.counts > 0).sum() > 20


def test_counts_are_numpys():
    x = awkward()
    for edges in (np.linspace(-3, 3, 11), np.linspace(-2, float(x[5, 5]), 4)):
        np.testing.assert_array_equal(count_between(x, edges), np.histogram(x[np.isfinite(x)], edges)[0])
    assert count_between(x, np.zeros(1)).size == 0


def test_a_dead_rank_is_in_no_row_and_is_named():
    x, one = sharded(missing=(1,))
    table = rank_table(one)
    assert [row.name for row in table.rows] == ["whole", "rank 0", "rank 2", "rank 3"]
    assert table.rows[0].stats.n == x.size - 12
    assert table.notes[0] == "rank 1 cannot answer and is in no row."


def test_equal_replicas_are_counted_once_and_said_to_be_equal():
    x = awkward()
    one = replicas(x, x.copy(), x.copy())
    assert rank_table(one).rows[0].stats.n == x.size
    assert agreement(one) == ("3 replicas on ranks 0\u20132: bit-equal.",)
    assert disagreements(one) == ()
    assert "ranks 0\u20132 \u00d73" in compose(one, Look()).col_ribbon[0].text


def test_a_perturbed_replica_is_reported_with_the_pair_of_ranks():
    x = awkward()
    other = x.copy()
    other[5, 5] += np.float32(0.25)
    (said,) = disagreements(replicas(x, x.copy(), other))
    assert said.startswith("3 replicas on ranks 0\u20132 differ: ranks 0, 2 by up to 0.25.")
    assert "The whole shows rank 0." in said


def test_replicas_that_differ_in_a_bit_or_in_a_nan_are_reported_too():
    x = awkward()
    zero, broken = x.copy(), x.copy()
    zero[3, 3] = 0.0
    broken[5, 5] = np.nan
    assert "differ: ranks 0, 1 only in bits" in disagreements(replicas(x, zero))[0]
    assert "1 values are not finite in only one of them" in disagreements(replicas(x, broken))[0]


def test_summands_can_be_looked_at_one_by_one():
    parts = [np.random.default_rng(seed).normal(size=SHAPE) for seed in range(2)]
    one = summands(*parts)
    assert compose(one, Look()).col_ribbon[0].text == "sum of ranks 0, 1"
    assert agreement(one) == ()
    table = rank_table(one)
    assert [row.name for row in table.rows] == ["whole", "summand of rank 0", "summand of rank 1"]
    assert table.rows[0].stats.max == pytest.approx(sum(parts).max())
    assert table.rows[1].stats.max == parts[0].max()
    np.testing.assert_array_equal(one.held(1).read((slice(None), slice(None))), parts[1])
    assert "rank 1 at [2, 3]" in probe(one.held(1), compose(one.held(1), Look()), 2, 3)


def test_a_ranks_own_piece_is_what_it_holds():
    x, one = sharded()
    np.testing.assert_array_equal(one.held(2).read((slice(None), slice(None))), x[:, 4:6])


@pytest.mark.parametrize("array", [np.full((2, 2), np.nan), np.zeros((2, 2)), np.array([[True, False]])])
def test_every_kind_of_data_has_a_table(array):
    table = rank_table(ArraySource(array))
    assert str(array.size) in str(table)
    assert "histogram" in str(table)


def test_the_table_is_read_as_text():
    _, one = sharded()
    text = repr(rank_table(one))
    assert text.splitlines()[0].split() == [
        "n", "min", "max", "mean", "std", "zeros", "NaN", "+Inf", "-Inf", "outside", "bins", "histogram",
    ]  # fmt: skip
    assert text.splitlines()[4].startswith("rank 2")
    assert "equal bins from" in text


def test_bars_show_whatever_is_not_zero():
    assert bars([0, 1, 1_000_000]) == " \u2581\u2588"
    assert bars([]) == ""
