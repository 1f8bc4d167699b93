"""A part cut out of every rank's piece and joined is the part of the whole; pasted back, the rest stays."""

import pytest
import torch

from flexmagic.layout.assemble import assemble, split
from flexmagic.layout.layout import Layout, contiguous_spans
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.part import Part, spans_of

SHAPE = (3, 7, 12)
WHOLE = torch.arange(252.0).reshape(SHAPE)
PICKED = {
    "last token": {1: [6]},
    "a row": {0: [1]},
    "a row and tokens": {0: [0, 2], 1: [0, 2, 3, 6]},
    "columns": {2: [1, 2, 3, 9]},
    "everything": {1: list(range(7))},
    "tokens and columns": {1: [5], 2: [0, 11]},
}
CUTS = {
    "columns": (2, contiguous_spans([5, 7])),
    "interleaved columns": (2, [((0, 2), (8, 12)), ((2, 8),)]),
    "columns in another order": (2, [((6, 12), (0, 2)), ((2, 6),)]),
    "rows": (0, contiguous_spans([2, 1])),
    "tokens": (1, contiguous_spans([4, 3])),
    "copies": (2, [((0, 12),)] * 2),
}


def layout_of(cut, *, addends=()):
    dim, spans = CUTS[cut]
    blocks = tuple(tuple(own if d == dim else ((0, n),) for d, n in enumerate(SHAPE)) for own in spans)
    return Layout(SHAPE, ("batch", "seq", "f"), "float32", Mesh(("tp",), (2,)), blocks, addends)


def pieces_of(layout):
    if not layout.addends:
        return {rank: split(layout, rank, WHOLE) for rank in (0, 1)}
    first = torch.rand(SHAPE).round()
    return {0: first, 1: WHOLE - first}


@pytest.mark.parametrize("picked", PICKED)
@pytest.mark.parametrize("cut", [*CUTS, "addends"])
def test_a_part_goes_there_and_back(cut, picked):
    layout = layout_of("copies", addends=(0, 1)) if cut == "addends" else layout_of(cut)
    positions = PICKED[picked]
    part = Part.of(layout, {dim: spans_of(at) for dim, at in positions.items()})
    index = torch.meshgrid(
        *[torch.tensor(positions.get(d, list(range(n)))) for d, n in enumerate(SHAPE)], indexing="ij"
    )
    pieces = pieces_of(layout)
    cuts = {rank: part.cut(rank, piece).contiguous() for rank, piece in pieces.items()}
    assert all(tuple(cuts[rank].shape) == part.layout.local_shape(rank) for rank in cuts)
    x = assemble(part.layout, cuts)
    assert torch.equal(x, WHOLE[index])
    new = {rank: part.pasted(rank, pieces[rank], split(part.layout, rank, -x - 1)) for rank in pieces}
    truth = WHOLE.clone()
    truth[index] = -truth[index] - 1
    assert torch.equal(assemble(layout, new), truth)
    assert not torch.equal(truth, WHOLE)


def test_a_part_that_one_rank_has_alone():
    part = Part.of(layout_of("rows"), {0: ((2, 3),)})
    assert part.layout.local_shape(0) == (0, 7, 12)
    assert part.layout.local_shape(1) == (1, 7, 12)
    assert not part.layout.replicated
