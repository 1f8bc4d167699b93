"""Inferring layouts from what ranks saw, on simulated ranks: right, or refused with the reason."""

import math

import pytest
import torch
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

from flexmagic.engine.probe import note
from flexmagic.errors import LayoutError
from flexmagic.layout.dims import PROBES, Dim, name_dims
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.sites import Site
from flexmagic.layout.survey import Expected, Seen, WeightSplit, infer

B, S = PROBES[0]
A = Site("layer.a")
W = Site("layer.sum")
ORDERED = (WeightSplit("layer.a", 0, (4, 4), in_order=True),)
DIMS = (Dim("batch"), Dim("seq"), Dim("mlp", 8))


def whole(seed=0, width=8):
    return torch.randn(B, S, width, generator=torch.Generator().manual_seed(seed))


def survey(per_rank, *, expected=True, weights=ORDERED, site=A, more=None):
    """The rule for one site from each rank's local tensor; ``more``: other sites, per rank."""
    seen = [{site: note(t, t)} if t is not None else {} for t in per_rank]
    for name, tensors in (more or {}).items():
        for of_rank, t in zip(seen, tensors, strict=True):
            of_rank[name] = note(t, t)
    shape = (B, S, 8)
    twin = {s: Expected(shape, DIMS) for of_rank in seen for s in of_rank} if expected else None
    return infer(Mesh(("tp",), (len(per_rank),)), seen, twin, weights)[site]


def test_equal_tensors_of_full_shape_are_replicas():
    rule = survey([whole(), whole()])
    assert rule.placements == (Replicate(),)
    assert not rule.refused
    assert rule.dims == DIMS


def test_pieces_that_add_up_are_a_shard_in_rank_order():
    rule = survey([whole()[..., :4], whole()[..., 4:]])
    assert rule.placements == (Shard(2),)
    layout = rule.local_layout([(3, 9, 4), (3, 9, 4)])
    assert layout.shape == (3, 9, 8)
    assert [block[2] for block in layout.blocks] == [((0, 4),), ((4, 8),)]


def test_uneven_pieces():
    weights = (WeightSplit("layer.a", 0, (3, 3, 2), in_order=True),)
    w = whole()
    rule = survey([w[..., :3], w[..., 3:6], w[..., 6:]], weights=weights)
    assert list(rule.spans) == [((0, 3),), ((3, 6),), ((6, 8),)]


def test_ranks_that_hold_the_same_piece_share_it():
    w = whole()
    rule = survey([w[..., :4], w[..., :4], w[..., 4:], w[..., 4:]])
    assert rule.spans == (((0, 4),), ((0, 4),), ((4, 8),), ((4, 8),))
    assert rule.local_layout([(B, S, 4)] * 4).owners() == (0, 2)


def test_addends_are_a_partial_sum_only_if_some_site_holds_the_sum():
    a, b = whole(1), whole(2)
    rule = survey([a, b], more={W: [a + b, a + b]})
    assert rule.placements == (Partial(),)
    assert "layer.sum" in rule.how
    assert "no site holds their sum" in survey([a, b], more={W: [a - b, a - b]}).refused
    assert "no site holds their sum" in survey([a, b]).refused


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([whole()[..., :4], whole()[..., :4]], "do not add up"),
        ([whole()[..., :4], whole()[..., 3:]], "do not add up"),
        ([whole()[:1, :, :4], whole()[1:, :, 4:]], "more than one dim"),
        ([whole()[:, :2], whole()[:, 2:]], "follows the input"),
        ([whole(), None], "rank 1 has no such site"),
        ([whole(), whole().double()], "different kinds"),
        ([whole(), whole()[0]], "different kinds"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(tensors, reason):
    rule = survey(tensors)
    assert reason in rule.refused
    with pytest.raises(LayoutError, match="is refused"):
        rule.local_layout([(B, S, 8), (B, S, 8)])


def test_pieces_without_a_known_order_are_refused():
    pieces = [whole()[..., :4], whole()[..., 4:]]
    assert "no split weight" in survey(pieces, weights=()).refused
    unordered = (WeightSplit("layer.a", 0, (4, 4), in_order=False),)
    assert "plain rank order" in survey(pieces, weights=unordered).refused
    sibling = (WeightSplit("layer.up", 0, (4, 4), in_order=True),)
    assert survey(pieces, weights=sibling).placements == (Shard(2),)


def test_without_an_unsharded_form_only_what_is_equal_everywhere_is_given():
    w = whole()
    assert survey([w, w], expected=False, weights=()).placements == (Replicate(),)
    assert "no unsharded form" in survey([w[..., :4], w[..., 4:]], expected=False).refused


def test_a_constant_is_whole_only_in_a_model_of_which_nothing_is_split():
    ones, w = torch.ones(B, S, 8), whole()
    plain = survey([ones, ones], expected=False, weights=(), more={W: [w, w]})
    assert plain.placements == (Replicate(),)
    split = survey([ones, ones], expected=False, weights=(), more={W: [w[..., :4], w[..., 4:]]})
    assert "cannot be told from the whole" in split.refused
    weights = survey([ones, ones], expected=False, weights=ORDERED, more={W: [w, w]})
    assert "cannot be told from the whole" in weights.refused


def test_a_dtensor_says_itself_how_it_lies():
    def seen(width):
        return {A: Seen((B, S, width), "float32", (0.0,) * 4, 1.0, False, (Shard(2),), (B, S, 8))}

    rule = infer(Mesh(("tp",), (2,)), [seen(5), seen(3)], None, ())[A]
    assert rule.spans == (((0, 5),), ((5, 8),))
    assert "do not add up" in infer(Mesh(("tp",), (2,)), [seen(5), seen(5)], None, ())[A].refused


def test_a_run_whose_shapes_do_not_follow_the_rule_is_refused():
    rule = survey([whole()[..., :4], whole()[..., 4:]])
    with pytest.raises(LayoutError, match="do not follow"):
        rule.local_layout([(1, 2, 4), (1, 2, 3)])
    with pytest.raises(LayoutError, match="rank 1 never reached"):
        rule.local_layout([(1, 2, 4), None])
    with pytest.raises(LayoutError, match="do not follow"):
        survey([whole(), whole()]).local_layout([(1, 2, 8), (1, 3, 8)])
    with pytest.raises(LayoutError, match="do not follow"):
        survey([whole(), whole()]).local_layout([(1, 2, 7), (1, 2, 7)])


def test_dims_are_named_by_how_they_follow_the_input():
    names = {"vocab": 50, "hidden": 16, "heads": 4}
    first, second = (2, 4, 5, 5), (3, 4, 7, 7)
    assert [d.name for d in name_dims(first, second, names)] == ["batch", "heads", "seq", "seq"]
    assert name_dims((10, 16), (21, 16), names) == (Dim("batch·seq"), Dim("hidden", 16))
    assert name_dims((1, 5, 50), (1, 7, 50), names)[0] == Dim("one", 1)
    assert name_dims((2, 9), (3, 9), names)[1] == Dim("feature", 9)
    assert name_dims((2, 6), (3, 8), names) is None
    assert name_dims((2,), (3, 8), names) is None


def test_fingerprints_tell_tensors_apart_and_add_up():
    a, b = whole(1), whole(2)
    fa, fb, fsum = (torch.tensor(note(t, t).fingerprint) for t in (a, b, a + b))
    assert not torch.allclose(fa, fb, rtol=1e-3)
    assert torch.allclose(fa + fb, fsum, rtol=1e-4, atol=1e-4)
    swapped = a.flip(-1)
    assert not torch.allclose(fa, torch.tensor(note(swapped, swapped).fingerprint), rtol=1e-3)
    masked = torch.tensor([0.0, -torch.inf, torch.nan])
    assert all(math.isfinite(x) for x in note(masked, masked).fingerprint)
