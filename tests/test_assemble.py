"""Assembling, splitting and reading parts of a whole: numpy or the whole itself is the oracle."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
UNSUMMABLE = [torch.bool, torch.float8_e4m3fn]


def filled(shape, dtype=torch.float32):
    numbers = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape) - 3
    return (numbers % 2 == 0) if dtype == torch.bool else numbers.to(dtype)


def sharded(shape, dim, spans_per_rank):
    blocks = tuple(
        tuple(spans if d == dim else ((0, n),) for d, n in enumerate(shape)) for spans in spans_per_rank
    )
    return Layout(shape, ("d",) * len(shape), "float32", Mesh(("tp",), (len(blocks),)), blocks)


def replicated(shape, n, addends=()):
    block = tuple(((0, size),) for size in shape)
    return Layout(shape, ("d",) * len(shape), "float32", Mesh(("tp",), (n,)), (block,) * n, addends)


MESHES = [(1,), (2,), (3,), (5,), (8,), (2, 2), (2, 3), (4, 2), (2, 2, 2), (1, 3), (2, 1, 4)]


def cut_at_random(draw, spans, n):
    """The spans cut into n pieces at any places, pieces of nothing and of several spans included."""
    cuts = [p for start, stop in spans for p in range(start + 1, stop)]
    at = set(draw(st.lists(st.sampled_from(cuts), max_size=5))) if cuts else set()
    parts = []
    for start, stop in spans:
        edges = [start, *sorted(p for p in at if start < p < stop), stop]
        parts += [(a, b) for a, b in itertools.pairwise(edges) if a < b]
    owners = draw(st.lists(st.integers(0, n - 1), min_size=len(parts), max_size=len(parts)))
    order = draw(st.permutations(range(len(parts))))
    return [tuple(parts[i] for i in order if owners[i] == piece) for piece in range(n)]


@st.composite
def layouts(draw, *, sums=False, smallest=0):
    """A layout over a mesh of up to 8 ranks, and what it is on every axis.

    Each axis cuts a dim (or what an axis before it left of it) unevenly and in any order, copies, or,
    with ``sums``, adds; some ranks may hold nothing if others hold the same.
    """
    shape = tuple(draw(st.lists(st.integers(smallest, 6), max_size=4)))
    mesh = Mesh(tuple("abc"[: len(sizes := draw(st.sampled_from(MESHES)))]), sizes)
    held = [[((0, n),) if n else () for n in shape] for _ in range(mesh.size)]
    addends = [0] * mesh.size
    kinds = ["copy", *(["cut"] if shape else []), *(["add"] if sums else [])]
    for axis, n in enumerate(mesh.shape):
        kind = draw(st.sampled_from(kinds))
        if kind == "add":
            addends = [old * n + mesh.coordinate(rank)[axis] for rank, old in enumerate(addends)]
        if kind != "cut":
            continue
        dim, done = draw(st.integers(0, len(shape) - 1)), {}
        for rank in range(mesh.size):
            before = held[rank][dim]
            if before not in done:
                done[before] = cut_at_random(draw, before, n)
            held[rank][dim] = done[before][mesh.coordinate(rank)[axis]]
    blocks = [tuple(h) for h in held]
    parts = list(zip(blocks, addends, strict=True))
    spare = [rank for rank, part in enumerate(parts) if part in parts[:rank]]
    absent = draw(st.sets(st.sampled_from(spare))) if spare else set()
    given_blocks = tuple(None if rank in absent else block for rank, block in enumerate(blocks))
    total = tuple(addends) if len(set(addends)) > 1 else ()
    return Layout(shape, ("d",) * len(shape), "float32", mesh, given_blocks, total)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)


def bytes_of(t):
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def taken_apart(layout, whole):
    pieces = {rank: split(layout, rank, whole) for rank in range(layout.mesh.size)}
    return {rank: piece for rank, piece in pieces.items() if piece is not None}


@settings(max_examples=250, deadline=None)
@given(layouts(), st.sampled_from(DTYPES))
def test_assembling_what_was_split_gives_the_same_bits(layout, dtype):
    whole = filled(layout.shape, dtype)
    pieces = taken_apart(layout, whole)
    assert tuple(pieces) == layout.ranks
    for rank, piece in pieces.items():
        assert tuple(piece.shape) == layout.local_shape(rank)
        assert piece.is_contiguous()
    assert same_bits(assemble(layout, pieces), whole)
    asked = {rank: pieces[rank] for rank in layout.owners()}
    assert same_bits(assemble(layout, asked), whole)


@settings(max_examples=150, deadline=None)
@given(layouts(sums=True), st.sampled_from([d for d in DTYPES if d not in UNSUMMABLE]))
def test_a_whole_split_into_addends_adds_up_to_the_same_bits(layout, dtype):
    whole = filled(layout.shape, dtype)
    if dtype.is_floating_point and whole.numel():
        whole.view(-1)[0] = -0.0
    assert same_bits(assemble(layout, taken_apart(layout, whole)), whole)


@settings(max_examples=150, deadline=None)
@given(layouts(sums=True))
def test_addends_are_added_once_each(layout):
    whole = filled(layout.shape, torch.int64)
    pieces = taken_apart(dataclasses.replace(layout, addends=()), whole)
    expected = whole * len(set(layout.addends) or {0})
    assert torch.equal(assemble(layout, pieces), expected)


@settings(max_examples=200, deadline=None)
@given(layouts(), st.data())
def test_reading_a_window_asks_only_for_what_it_shows(layout, data):
    whole = filled(layout.shape)
    pieces = taken_apart(layout, whole)
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


@settings(max_examples=150, deadline=None)
@given(layouts(smallest=1), st.data())
def test_a_missing_piece_is_named_or_another_rank_stands_in(layout, data):
    pieces = taken_apart(layout, filled(layout.shape))
    lost = data.draw(st.sampled_from(layout.ranks))
    others = [r for r in layout.ranks if layout.blocks[r] == layout.blocks[lost] and r != lost]
    without = layout.owners(without=[lost])
    assert lost not in without
    assert bool(others) == any(layout.blocks[r] == layout.blocks[lost] for r in without)
    if lost in layout.owners():
        with pytest.raises(LayoutError, match=f"rank {lost} "):
            assemble(layout, {rank: piece for rank, piece in pieces.items() if rank != lost})


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
    layout = replicated((2, 2), 3, (0, 1, 2))
    whole = filled((2, 2))
    assert layout.partial
    assert not layout.replicated
    assert layout.owners() == (0, 1, 2)
    assert torch.equal(assemble(layout, dict.fromkeys(range(3), whole)), 3 * whole)
    pieces = {rank: split(layout, rank, whole) for rank in range(3)}
    assert torch.equal(pieces[0], whole)
    assert not pieces[1].any()
    assert torch.equal(assemble(layout, pieces), whole)


@pytest.mark.parametrize("dtype", UNSUMMABLE)
def test_addends_of_a_dtype_without_a_sum_are_refused(dtype):
    layout, whole = replicated((2, 2), 2, (0, 1)), filled((2, 2), dtype)
    with pytest.raises(LayoutError, match="cannot be added"):
        assemble(layout, {0: whole, 1: whole})
    with pytest.raises(LayoutError, match="cannot be added"):
        split(layout, 1, whole)


def test_a_gap_or_a_wrong_piece_is_never_filled_in():
    layout = sharded((4,), 0, contiguous_spans([2, 2]))
    piece = torch.ones(2)
    with pytest.raises(LayoutError, match="rank 1"):
        assemble(layout, {0: piece})
    with pytest.raises(LayoutError, match=r"rank 1 holds \(3,\)"):
        assemble(layout, {0: piece, 1: torch.ones(3)})
    with pytest.raises(LayoutError, match=r"rank 1 holds torch\.float64"):
        assemble(layout, {0: piece, 1: piece.double()})
    gappy = sharded((5,), 0, contiguous_spans([2, 2]))
    with pytest.raises(LayoutError, match="4 of 5"):
        assemble(gappy, {0: piece, 1: piece})


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([((0, 2),), ((1, 3),)], "overlap"),
        ([((0, 2), (1, 3)), ()], "overlap"),
        ([((0, 2),), ((3, 5),)], "outside"),
        ([((0, 3),), ((1, 3),)], "5 of 4"),
    ],
)
def test_a_layout_that_holds_an_element_twice_or_none_is_refused(spans, reason):
    layout = sharded((4,), 0, spans)
    pieces = {rank: torch.ones(layout.local_shape(rank)) for rank in range(2)}
    with pytest.raises(LayoutError, match=reason):
        assemble(layout, pieces)


def test_a_tensor_that_no_rank_holds_is_refused():
    with pytest.raises(LayoutError, match="no rank has it"):
        assemble(Layout((2,), ("d",), "float32", Mesh(("tp",), (2,)), (None, None)), {})


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
