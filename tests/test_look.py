"""What a rank computes of its piece, joined, equals what numpy computes of the whole."""

import numpy as np
import pytest
import torch

from flexmagic.engine import look
from flexmagic.layout.assemble import plan_read, split
from flexmagic.layout.layout import Layout, contiguous_spans
from flexmagic.layout.mesh import Mesh
from flexmagic.view.reduce import compute_stats, merge_overviews, merge_stats, reduce_overview

WHOLE = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
WHOLE[0, 1, 2], WHOLE[1, 3, 4], WHOLE[0, 6, 10], WHOLE[1, 0, 0] = torch.nan, torch.inf, -torch.inf, 0


def pieces(dim, sizes):
    spans = contiguous_spans(sizes)
    blocks = tuple(tuple(own if d == dim else ((0, n),) for d, n in enumerate(WHOLE.shape)) for own in spans)
    layout = Layout(tuple(WHOLE.shape), ("a", "b", "c"), "float32", Mesh(("tp",), (len(sizes),)), blocks)
    return layout, {rank: split(layout, rank, WHOLE) for rank in range(len(sizes))}


@pytest.mark.parametrize(("dim", "sizes"), [(2, [6, 5]), (2, [4, 4, 3, 0]), (1, [3, 4]), (0, [1, 1])])
def test_statistics_merge_to_those_of_the_whole(dim, sizes):
    layout, local = pieces(dim, sizes)
    reads = plan_read(layout, tuple((0, n) for n in WHOLE.shape))
    merged = merge_stats([look.stats(local[r.rank], r.local) for r in reads])
    truth = compute_stats(WHOLE.numpy())
    assert (merged.n, merged.nan, merged.posinf, merged.neginf, merged.zeros) == (154, 1, 1, 1, 1)
    assert (merged.min, merged.max) == (truth.min, truth.max)
    assert merged.mean == pytest.approx(truth.mean, rel=1e-12)
    assert merged.std == pytest.approx(truth.std, rel=1e-12)


@pytest.mark.parametrize(("dim", "sizes"), [(2, [6, 5]), (2, [4, 4, 3]), (1, [3, 4]), (0, [1, 1])])
@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (2, 1), (0, 2)])
def test_overviews_merge_to_that_of_the_whole(dim, sizes, rows, cols):
    layout, local = pieces(dim, sizes)
    fixed = {d: 1 for d in range(3) if d not in (rows, cols)}
    edges = [np.unique(np.linspace(0, WHOLE.shape[d], 4).astype(np.int64)) for d in (rows, cols)]
    edges[1] = edges[1][1:] if len(edges[1]) > 3 else edges[1]  # a window that starts inside
    window = look.Window(rows, cols, fixed, *edges)
    parts = [
        look.overview(local[r.rank], r.local, r.result, window) for r in plan_read(layout, window.bounds(3))
    ]
    merged = merge_overviews(parts)
    index = tuple(fixed.get(d, slice(None)) for d in range(3))
    plane = WHOLE.numpy()[index]
    truth = reduce_overview(plane.T if rows > cols else plane, *edges)
    for name in ("n", "nan", "posinf", "neginf"):
        assert np.array_equal(getattr(merged, name), getattr(truth, name)), name
    for name in ("mean", "rms", "extremum"):
        np.testing.assert_allclose(getattr(merged, name), getattr(truth, name), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.int32, torch.bool]
)
def test_slices_keep_their_bits_and_arrays_their_values(dtype):
    piece = (torch.arange(24).reshape(4, 6) % 5).to(dtype)
    part = (slice(1, 3), slice(0, 6, 1))
    raw = look.slice_bytes(piece, part)
    back = torch.from_numpy(raw.copy()).view(dtype).reshape(2, 6)
    assert torch.equal(back.float(), piece[part].float())
    array = look.as_array(piece)
    assert array.dtype == (np.float32 if dtype in (torch.bfloat16, torch.float8_e4m3fn) else array.dtype)
    assert np.array_equal(array.astype(np.float64), piece.to(torch.float64).numpy())
    assert look.slice_bytes(piece, (slice(0, 0), slice(0, 6))).size == 0
