"""In which order pieces follow each other, as split weights or a site that holds the whole show it."""

import pytest
import torch

from flexmagic.engine.probe import note
from flexmagic.layout.order import Cut, positions, spans_by_weights
from flexmagic.layout.seen import WeightSplit
from flexmagic.layout.sites import Site

HALVES = (((0, 4),), ((4, 8),))
SWAPPED = HALVES[::-1]
GATED = (((0, 4), (8, 12)), ((4, 8), (12, 16)))


def weight(module, spans, dim=0):
    whole = max((stop for part in spans for _, stop in part or ()), default=0)
    return WeightSplit(module, dim, whole, spans)


def spans(path, *weights, port="output", sizes=(4, 4), holders=(0, 1), dim=2):
    return spans_by_weights(Site(path, port), Cut(dim, 3, holders, sizes), weights)


def test_the_modules_own_weight_decides():
    assert spans("mlp.up", weight("mlp.up", SWAPPED), weight("mlp.down", HALVES)) == SWAPPED
    assert spans("mlp.up", weight("mlp.up", GATED), sizes=(8, 8)) == GATED
    assert spans("mlp.down", weight("mlp.down", SWAPPED, dim=1), port="input") == SWAPPED
    both = weight("mlp", SWAPPED), weight("mlp", HALVES, dim=1)
    assert spans("mlp", *both) == SWAPPED
    assert spans("mlp", *both, port="input") == HALVES


def test_what_has_no_weight_follows_the_nearest_in_plain_order_or_the_one_that_fits():
    far = weight("head", SWAPPED)
    assert spans("mlp.act", weight("mlp.up", HALVES), far) == HALVES
    assert spans("mlp.act", weight("mlp.up", GATED), weight("mlp.down", HALVES, dim=1)) == HALVES
    assert spans("mlp.act", weight("mlp.up", SWAPPED)) == SWAPPED
    assert spans("act", far) == SWAPPED
    uneven = weight("mlp.up", (((0, 2),), ((2, 8),)))
    assert spans("mlp.act", uneven, weight("mlp.down", SWAPPED)) == SWAPPED  # the one that has these lengths
    assert spans("mlp.act", weight("mlp.up", HALVES), sizes=(2, 2)) == (((0, 2),), ((2, 4),))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([], "no split weight"),
        ([weight("mlp.up", ((), ()))], "no split weight"),
        ([weight("mlp.up", (((0, 4),), None))], "mlp.up are not split in plain"),
        ([weight("mlp.up", GATED)], "mlp.up are not split in plain"),
        ([weight("mlp.up", SWAPPED), weight("mlp.down", HALVES, dim=1)], "mlp.up are not split in plain"),
    ],
)
def test_an_order_that_is_not_sure_is_not_given(weights, reason):
    assert reason in spans("mlp.act", *weights)


def test_a_weight_that_is_not_in_the_whole_is_named():
    strange = WeightSplit("mlp.up", 0, 8, (((0, 4),), None), "mlp.up.weight", "rank 1 holds other values")
    assert spans("mlp.up", strange) == spans("mlp.act", strange) == "rank 1 holds other values"


def test_ranks_may_hold_the_parts_the_other_way_round_than_ranks_before_them():
    both = weight("mlp.up", (*HALVES, *SWAPPED))
    assert spans("mlp.act", both) == HALVES
    assert spans("mlp.act", both, holders=(2, 3)) == SWAPPED
    assert "not split in plain" in spans("mlp.act", both, holders=(2, 3), sizes=(2, 2))


def test_weights_of_other_stages_say_nothing():
    weights = weight("a.up", ((), (), *SWAPPED)), weight("a.down", (*HALVES, (), ()))
    assert spans("a.act", *weights, holders=(2, 3)) == SWAPPED
    assert spans("a.act", *weights, holders=(0, 1)) == HALVES


def test_positions_of_slices_in_the_whole():
    whole = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    mine = note(whole[:, [4, 0, 5]], whole)
    known = note(whole, whole)
    assert positions(mine, known.slices[1], 1, known.norm) == [4, 0, 5]
    other = note(whole[:, :2] + 1, whole)
    assert positions(other, known.slices[1], 1, known.norm) is None
    twice = torch.cat([whole[:, :3], whole[:, :3]], 1)
    assert positions(note(whole[:, :1], whole), note(twice, twice).slices[1], 1, known.norm) is None


def test_several_weights_fused_into_one_are_plain_where_one_of_their_length_shows_it():
    three = (((0, 4), (8, 12), (16, 20)), ((4, 8), (12, 16), (20, 24)))
    fused, out = weight("attn.qkv", three), weight("attn.out", HALVES, dim=1)
    assert spans("attn.drop", fused, out, sizes=(2, 2), dim=1) == (((0, 2),), ((2, 4),))
    assert spans("attn.drop", fused, out, sizes=(12, 12)) == three  # of the fused weight's own length
    assert "attn.qkv" in spans("attn.drop", fused, sizes=(2, 2), dim=1)
    every_second = weight("attn.qkv", (((0, 1), (2, 3)), ((1, 2), (3, 4))))
    assert "attn.qkv" in spans("attn.drop", every_second, out, sizes=(3, 3), dim=1)
    turned = weight("attn.qkv", tuple(reversed(three)))
    assert "attn.qkv" in spans("attn.drop", turned, out, sizes=(2, 2), dim=1)
