"""Assembling, splitting and reading parts of a whole: numpy or the whole itself is the oracle."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

from flexmagic.errors import InputError, LayoutError
from flexmagic.layout.assemble import assemble, normalise, plan_read, split, window_of
from flexmagic.layout.layout import Layout, contiguous_spans
from flexmagic.layout.mesh import Mesh

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def filled(shape, dtype=torch.float32):
    numbers = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape) - 3
    return (numbers % 2 == 0) if dtype == torch.bool else numbers.to(dtype)


def sharded(shape, dim, spans_per_rank):
    blocks = tuple(
        tuple(spans if d == dim else ((0, n),) for d, n in enumerate(shape)) for spans in spans_per_rank
    )
    n = len(spans_per_rank)
    return Layout(shape, ("d",) * len(shape), "float32", Mesh(("tp",), (n,)), (Shard(dim),), blocks)


def replicated(shape, n):
    block = tuple((((0, size),)) for size in shape)
    return Layout(
        shape, ("d",) * len(shape), "float32", Mesh(("tp",), (n,)), (Replicate(),), (tuple(block),) * n
    )


@st.composite
def layouts(draw):
    """A 1-axis layout over up to 8 ranks: uneven, empty, interleaved or permuted pieces, replicas."""
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=ndim, max_size=ndim)))
    ranks = draw(st.integers(1, 8))
    dim = draw(st.integers(0, ndim - 1))
    cuts = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=0, max_size=6)))
    edges = [0, *cuts, shape[dim]]
    segments = [(a, b) for a, b in itertools.pairwise(edges) if a < b]
    owners = draw(st.lists(st.integers(0, ranks - 1), min_size=len(segments), max_size=len(segments)))
    order = draw(st.permutations(range(len(segments))))
    spans = [tuple(segments[i] for i in order if owners[i] == rank) for rank in range(ranks)]
    return sharded(shape, dim, spans), draw(st.sampled_from(DTYPES))


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)


def bytes_of(t):
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_assembling_what_was_split_gives_the_same_bits(case):
    layout, dtype = case
    whole = filled(layout.shape, dtype)
    pieces = {rank: split(layout, rank, whole) for rank in range(layout.mesh.size)}
    for rank, piece in pieces.items():
        assert tuple(piece.shape) == layout.local_shape(rank)
        assert piece.is_contiguous()
    assert same_bits(assemble(layout, pieces), whole)


@settings(max_examples=150, deadline=None)
@given(layouts(), st.data())
def test_reading_a_window_asks_only_for_what_it_shows(case, data):
    layout, _ = case
    whole = filled(layout.shape)
    pieces = {rank: split(layout, rank, whole) for rank in range(layout.mesh.size)}
    window = []
    for n in layout.shape:
        start = data.draw(st.integers(0, n))
        window.append((start, data.draw(st.integers(start, n))))
    out = torch.full([b - a for a, b in window], torch.nan)
    reads = plan_read(layout, tuple(window))
    for read in reads:
        assert out[read.result].isnan().all()  # no element is fetched twice
        out[read.result] = pieces[read.rank][read.local]
    assert torch.equal(out, whole[tuple(slice(a, b) for a, b in window)])
    moved = sum(pieces[r.rank][r.local].numel() for r in reads)
    assert moved == out.numel()


def test_replicas_are_asked_for_once():
    layout = replicated((2, 3), 4)
    assert layout.owners() == (0,)
    assert layout.replicated
    assert [r.rank for r in plan_read(layout, ((0, 2), (0, 3)))] == [0]


def test_ranks_that_share_a_piece_count_once():
    left, right = ((0, 2),), ((2, 4),)
    layout = sharded((3, 4), 1, [left, left, right, right])
    whole = filled((3, 4))
    assert layout.owners() == (0, 2)
    assert torch.equal(assemble(layout, {0: whole[:, :2], 2: whole[:, 2:]}), whole)


def test_a_partial_sum_adds_up_and_splits_into_the_whole_and_zeros():
    base = replicated((2, 2), 3)
    layout = Layout(base.shape, base.dims, base.dtype, base.mesh, (Partial(),), base.blocks)
    whole = filled((2, 2))
    assert layout.owners() == (0, 1, 2)
    assert torch.equal(assemble(layout, dict.fromkeys(range(3), whole)), 3 * whole)
    pieces = {rank: split(layout, rank, whole) for rank in range(3)}
    assert torch.equal(pieces[0], whole)
    assert not pieces[1].any()
    assert torch.equal(assemble(layout, pieces), whole)


def test_a_gap_or_a_wrong_piece_is_never_filled_in():
    layout = sharded((4,), 0, contiguous_spans([2, 2]))
    piece = torch.ones(2)
    with pytest.raises(LayoutError, match="rank 1"):
        assemble(layout, {0: piece})
    with pytest.raises(LayoutError, match=r"rank 1 holds \(3,\)"):
        assemble(layout, {0: piece, 1: torch.ones(3)})
    gappy = sharded((5,), 0, contiguous_spans([2, 2]))
    with pytest.raises(LayoutError, match="4 of 5"):
        assemble(gappy, {0: piece, 1: piece})


ARRAY = np.arange(4 * 5 * 6).reshape(4, 5, 6)


@pytest.mark.parametrize(
    "index",
    [0, -1, ..., (0, -1), (slice(None), 2), (..., 3), (1, ..., -2), (slice(1, 3), slice(None, None, 2)),
     (slice(None, None, -1), 0), (slice(3, 1), 0), (slice(-2, None), slice(4, 0, -2), 5), (slice(2, 2), ...)],
)  # fmt: skip
def test_an_index_is_a_window_and_what_to_take_of_it(index):
    window, rest = window_of(normalise(index, ARRAY.shape), ARRAY.shape)
    cut = ARRAY[tuple(slice(a, b) for a, b in window)]
    assert np.array_equal(cut[rest], ARRAY[index])


@pytest.mark.parametrize("index", [4, (0, 5), (0, 0, 0, 0), ([0, 1],), None, True, "a", (..., ...), 1.5])
def test_other_indices_are_refused_with_a_sentence(index):
    with pytest.raises(InputError):
        normalise(index, ARRAY.shape)


def test_a_layout_describes_itself():
    layout = sharded((2, 4), 1, contiguous_spans([3, 1]))
    assert layout.describe_placements() == ("tp: Shard(dim=1)",)
    assert layout.describe_shape() == "d 2 × d 4"
    assert layout.local_shape(1) == (2, 1)


def test_a_mesh_knows_each_ranks_coordinate():
    mesh = Mesh(("dp", "tp"), (2, 3))
    assert [mesh.coordinate(r) for r in range(mesh.size)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert str(mesh) == "dp=2 × tp=3"
    with pytest.raises(ValueError, match="one size per axis"):
        Mesh(("tp",), (2, 3))
