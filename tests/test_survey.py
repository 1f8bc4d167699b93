"""Inferring layouts from what ranks saw, on simulated ranks: right, or refused with the reason."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from flexmagic.engine.probe import note
from flexmagic.errors import LayoutError
from flexmagic.layout.assemble import assemble
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Extent
from flexmagic.layout.seen import Distributed, Probe, WeightSplit
from flexmagic.layout.sites import Site
from flexmagic.layout.survey import CALLS, UNSTEADY, Evidence, infer

B, S = 2, 8
A, W, Q = Site("layer.a"), Site("layer.sum"), Site("layer.q")
DIMS = (Dim("batch"), Dim("seq"), Dim("mlp", 8))
TP2 = Mesh(("tp",), (2,))
DP2_TP2 = Mesh(("dp", "tp"), (2, 2))


def plain_weight(*sizes, module="layer.a", dim=0):
    edges = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    spans = tuple(((a, b),) for a, b in itertools.pairwise(edges))
    return WeightSplit(module, dim, edges[-1], spans)


ORDERED = (plain_weight(4, 4),)


def values(seed=0, seq=S, width=8, rows=B):
    """Activations of a batch whose rows are all the same, as in the probe."""
    one = torch.randn(1, seq, width, generator=torch.Generator().manual_seed(seed))
    return one.expand(rows, seq, width).contiguous()


def evidence(sites, *, mesh=None, groups=None, dims=None, weights=ORDERED, twin=True, local=None):
    """What is known of a model of which each site's tensors are given, one per rank or ``None``."""
    n = len(next(iter(sites.values())))
    groups = groups or (0,) * n
    named = {site: (dims or {}).get(site, DIMS) for site in sites}
    return Evidence(
        mesh=mesh or Mesh(("tp",), (n,)),
        probe=Probe(groups, (B,) * (max(groups) + 1), S),
        seen=[{s: note(t[r], t[r]) for s, t in sites.items() if t[r] is not None} for r in range(n)],
        weights=weights,
        whole=named if twin else None,
        local=local if local is not None else named,
    )


def survey(per_rank, *, site=A, more=None, **known):
    """The rule for one site from each rank's local tensor; ``more``: other sites, per rank."""
    return infer(evidence({site: per_rank, **(more or {})}, **known))[site]


def joined(rule, per_rank):
    """The whole that a rule makes of local tensors."""
    layout = rule.local_layout([None if t is None else tuple(t.shape) for t in per_rank])
    return assemble(layout, {r: t for r, t in enumerate(per_rank) if t is not None})


# --- ranks with the same rows ------------------------------------------------------------------------


def test_equal_tensors_of_full_shape_are_replicas():
    rule = survey([values(), values()])
    assert not rule.refused
    assert rule.placements == (Replicate(),)
    assert rule.replicated
    assert rule.dims == DIMS


@pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2, 2), (3, 3, 2), (5, 1, 2)])
def test_pieces_that_add_up_are_a_shard_in_the_weights_order(sizes):
    pieces = list(values().split(sizes, -1))
    rule = survey(pieces, weights=(plain_weight(*sizes),))
    assert rule.placements == (Shard(2),)
    assert not rule.replicated
    assert torch.equal(joined(rule, pieces), values())
    longer = values(3, seq=11, rows=5)
    assert torch.equal(joined(rule, longer.split(sizes, -1)), longer)


def test_ranks_that_hold_the_same_piece_share_it():
    left, right = values().chunk(2, -1)
    weights = (WeightSplit("layer.a", 0, 8, (((0, 4),), ((0, 4),), ((4, 8),), ((4, 8),))),)
    rule = survey([left, left, right, right], weights=weights)
    assert [s.place for s in rule.splits] == [(0, 0, 1, 1)]
    assert "share" in rule.how
    layout = rule.local_layout([(B, S, 4)] * 4)
    assert layout.owners() == (0, 2)
    assert torch.equal(joined(rule, [left, left, right, right]), values())


def test_pieces_in_another_order_than_the_ranks_follow_their_weights():
    left, right = values().chunk(2, -1)
    swapped = (WeightSplit("layer.a", 0, 8, (((4, 8),), ((0, 4),))),)
    assert torch.equal(joined(survey([right, left], weights=swapped), [right, left]), values())
    interleaved = (WeightSplit("layer.a", 0, 8, (((0, 2), (4, 6)), ((2, 4), (6, 8)))),)
    w = values()
    pieces = [torch.cat([w[..., 0:2], w[..., 4:6]], -1), torch.cat([w[..., 2:4], w[..., 6:8]], -1)]
    assert torch.equal(joined(survey(pieces, weights=interleaved), pieces), w)


def test_pieces_without_a_known_order_are_refused():
    pieces = list(values().chunk(2, -1))
    assert "no split weight" in survey(pieces, weights=()).refused
    unknown = (WeightSplit("layer.a", 0, 8, (((0, 4),), None)),)
    assert "plain rank order" in survey(pieces, weights=unknown).refused
    assert survey(pieces, weights=(plain_weight(4, 4, module="layer.up"),)).placements == (Shard(2),)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([values()[..., :4], values()[..., :4]], "do not add up"),
        ([values()[..., :4], values()[..., 3:]], "do not add up"),
        ([values()[:1, :, :4], values()[1:, :, 4:]], "more than one dim"),
        ([values()[:, :4], values()[:, 4:]], "split along seq"),
        ([values()[:1], values(1)[:1]], "split along batch"),
        ([values()[..., :4], None], "do not add up"),
        ([values(), values().double()], "different kinds"),
        ([values(), values()[0]], "different kinds"),
        ([torch.zeros(B, S, 8), torch.zeros(B, S, 8)], "zero on every rank"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(tensors, reason):
    rule = survey(tensors)
    assert reason in rule.refused
    with pytest.raises(LayoutError, match="is refused"):
        rule.local_layout([(B, S, 8), (B, S, 8)])


def test_a_tensor_that_the_unsharded_model_does_not_have_is_refused():
    assert "in no known way" in survey([values(), values()], dims={A: None}).refused
    assert "no such tensor" in survey([values(), values()], dims={A: DIMS[:2]}).refused


def test_a_mask_of_zeros_is_whole():
    mask = torch.zeros(B, 1, S, S)
    dims = {A: (Dim("batch"), Dim("one", 1), Dim("seq"), Dim("seq"))}
    assert survey([mask, mask], dims=dims).replicated


def test_what_only_some_ranks_hold_belongs_to_their_stage():
    w = values()
    rule = survey([None, w], weights=())
    assert rule.ranks == (1,)
    assert rule.placements == (None,)
    assert torch.equal(joined(rule, [None, w]), w)
    pieces = [None, None, *w.chunk(2, -1)]
    stages = Mesh(("pp", "tp"), (2, 2))
    weights = (WeightSplit("layer.a", 0, 8, ((), (), ((0, 4),), ((4, 8),))),)
    rule = survey(pieces, mesh=stages, weights=weights)
    assert rule.placements == (None, Shard(2))
    assert torch.equal(joined(rule, pieces), w)


# --- sums --------------------------------------------------------------------------------------------


def test_addends_are_a_partial_sum_only_if_some_site_holds_the_sum():
    a, b = values(1), values(2)
    rule = survey([a, b], more={W: [a + b, a + b]})
    assert rule.placements == (Partial(),)
    assert rule.addends == (0, 1)
    assert "layer.sum" in rule.how
    assert torch.equal(joined(rule, [a, b]), a + b)
    for sums in ([a - b, a - b], [a, a], [a + b, a]):
        assert "no site holds their sum" in survey([a, b], more={W: sums}).refused
    assert "no site holds their sum" in survey([a, b]).refused


def test_ranks_may_share_an_addend_or_hold_equal_ones():
    a, b = values(1), values(2)
    shared = survey([a, b, a, b], more={W: [a + b] * 4})
    assert shared.addends == (0, 1, 0, 1)
    assert torch.equal(joined(shared, [a, b, a, b]), a + b)
    apart = survey([a, b, a, b], more={W: [2 * (a + b)] * 4})
    assert apart.addends == (0, 1, 2, 3)
    zero = torch.zeros_like(a)
    assert survey([zero, zero, a], more={W: [a] * 3}).refused  # both would do now, but not once they change


def test_a_sum_is_found_where_it_was_scattered_along_the_sequence():
    a, b, other = values(1), values(2), values(3)
    total, seq = a + b, Site("layer.scattered")
    scattered = list(total.chunk(2, 1))
    more = {seq: scattered, Site("norm"): list(other.chunk(2, 1)), Site("gathered"): [other, other]}
    found = infer(evidence({A: [a, b], **more}))
    assert found[seq].placements == (Shard(1),)
    assert "gathered" in found[seq].how
    assert found[A].addends == (0, 1)
    wrong = {**more, seq: [scattered[0], scattered[1] + 0.1]}
    assert "no site holds their sum" in infer(evidence({A: [a, b], **wrong}))[A].refused


def test_a_sum_is_found_where_it_is_split_in_an_order_of_its_own():
    a, b = values(1), values(2)
    total, swapped = a + b, (WeightSplit("layer.q", 0, 8, (((4, 8),), ((0, 4),))),)
    right_first = [total[..., 4:], total[..., :4]]
    assert survey([a, b], more={Q: right_first}, weights=swapped).addends == (0, 1)
    left_first = [total[..., :4], total[..., 4:]]
    assert survey([a, b], more={Q: left_first}, weights=swapped).refused


# --- along the sequence ------------------------------------------------------------------------------


def sequence_parallel(order, whole=None, *, groups=None, mesh=None):
    """A site whose positions are spread over the ranks in an order, beside one that holds them all."""
    w = values() if whole is None else whole
    pieces = [w[:, list(part)] for part in order]
    return survey(pieces, more={W: [w] * len(pieces)}, groups=groups, mesh=mesh), pieces


@pytest.mark.parametrize("order", [(range(4), range(4, 8)), (range(5), range(5, 8)), (range(8), ())])
def test_positions_in_order_are_joined(order):
    rule, pieces = sequence_parallel(order)
    assert not rule.refused
    assert rule.placements == (Shard(1),)
    assert torch.equal(joined(rule, pieces), values())


@pytest.mark.parametrize(
    "order", [((0, 1, 6, 7), (2, 3, 4, 5)), ((4, 5, 6, 7), (0, 1, 2, 3)), ((0, 2, 4, 6), (1, 3, 5, 7))]
)
def test_positions_out_of_order_are_refused(order):
    assert "out of order" in sequence_parallel(order)[0].refused


def test_overlapping_positions_are_refused():
    assert sequence_parallel(((0, 1, 2, 3), (3, 4, 5, 6)))[0].refused


def test_what_is_split_alike_follows_the_order_seen_elsewhere_unless_one_is_out_of_order():
    w, other = values(), values(4)
    halves, zigzag = list(w.chunk(2, 1)), [[0, 1, 6, 7], [2, 3, 4, 5]]
    inner = list(other.chunk(2, 1))
    found = infer(evidence({A: inner, Q: halves, W: [w, w]}))
    assert "layer.sum" in found[A].how
    assert torch.equal(joined(found[A], inner), other)
    third = Site("third")
    rules = infer(evidence({A: inner, Q: halves, W: [w, w], third: [w[:, at] for at in zigzag]}))
    assert all("out of order" in rules[s].refused for s in (A, Q, third))
    rules = infer(evidence({A: [None, None, *inner], Q: [*halves, None, None], W: [w] * 4}))
    assert "no site that holds the whole" in rules[A].refused  # other ranks may have another order


def test_a_witness_in_rank_order_does_not_outweigh_one_that_shows_another():
    w = values()
    permuted = w[:, [0, 1, 6, 7, 2, 3, 4, 5]]  # gathered in rank order, never put right
    pieces = list(permuted.chunk(2, 1))
    for first, second in ((permuted, w), (w, permuted)):
        assert "out of order" in survey(pieces, more={W: [first] * 2, Q: [second] * 2}).refused


def test_repeated_positions_show_no_order():
    w = values(seq=1).expand(B, S, 8).contiguous()
    assert "no site that holds the whole" in sequence_parallel((range(3), range(3, 8)), w)[0].refused


# --- ranks with different rows -----------------------------------------------------------------------


def test_rows_of_the_data_groups_are_joined_in_order():
    one, two = values(1), values(2)
    groups = (0, 0, 1, 1)
    rule = survey([one, one, two, two], mesh=DP2_TP2, groups=groups)
    assert rule.placements == (Shard(0), Replicate())
    assert rule.replicated
    assert "2 data groups" in rule.how
    more = [values(5, rows=3)] * 2 + [values(6, rows=2)] * 2
    assert torch.equal(joined(rule, more), torch.cat([more[0], more[2]]))
    layout = rule.local_layout([(3, 9, 8)] * 4, Extent(shared_out=False))
    assert layout.shape == (3, 9, 8)
    assert layout.owners() == (0,)


@pytest.mark.parametrize("groups", [(0, 0, 1, 1), (0, 1, 0, 1)])
def test_rows_and_columns_are_joined(groups):
    halves = {0: values(1).chunk(2, -1), 1: values(2).chunk(2, -1)}
    tp = (0, 1, 0, 1) if groups == (0, 0, 1, 1) else (0, 0, 1, 1)
    spans = tuple(((4 * n, 4 * n + 4),) for n in tp)
    pieces = [halves[g][n] for g, n in zip(groups, tp, strict=True)]
    rule = survey(pieces, mesh=DP2_TP2, groups=groups, weights=(WeightSplit("layer.a", 0, 8, spans),))
    assert set(rule.placements) == {Shard(0), Shard(2)}
    assert torch.equal(joined(rule, pieces), torch.cat([values(1), values(2)]))


@pytest.mark.parametrize("groups", [(0, 0, 1, 1), (0, 1, 0, 1)])
def test_rows_and_positions_are_joined_only_if_every_group_has_them_in_order(groups):
    tp = (0, 1, 0, 1) if groups == (0, 0, 1, 1) else (0, 0, 1, 1)
    wholes = [values(1 + g) for g in groups]
    pieces = [w.chunk(2, 1)[n] for w, n in zip(wholes, tp, strict=True)]
    rule = survey(pieces, mesh=DP2_TP2, groups=groups, more={W: wholes})
    assert not rule.refused
    assert torch.equal(joined(rule, pieces), torch.cat([values(1), values(2)]))
    for odd in (0, 1):  # one group alone has the other half first
        swapped = [w.chunk(2, 1)[n ^ (g == odd)] for w, n, g in zip(wholes, tp, groups, strict=True)]
        assert "out of order" in survey(swapped, mesh=DP2_TP2, groups=groups, more={W: wholes}).refused


def test_addends_of_ranks_with_other_rows_are_added_apart():
    parts = [values(n) for n in (1, 2, 3, 4)]
    one, two = parts[0] + parts[1], parts[2] + parts[3]
    rule = survey(parts, mesh=DP2_TP2, groups=(0, 0, 1, 1), more={W: [one, one, two, two]})
    assert rule.placements == (Shard(0), Partial())
    assert rule.addends == (0, 1, 0, 1)
    assert torch.equal(joined(rule, parts), torch.cat([one, two]))


@pytest.mark.parametrize(
    ("dims", "tensors", "reason"),
    [
        ((Dim("mlp", 8),), [values(1)[0, 0], values(2)[0, 0]], "no dim follows the batch"),
        ((Dim("batch"), Dim("batch")), [values(1)[0, :2, :2], values(2)[0, :2, :2]], "more than one"),
        (DIMS, [values(1), None], "rank 1 with other rows"),
        (DIMS, [values(1), values(2)[..., :4]], "not so among all"),
        (
            (Dim("batch·seq"), Dim("mlp", 8)),
            [values(n).transpose(0, 1).reshape(-1, 8) for n in (1, 2)],
            "order does not follow",
        ),
        ((Dim("batch·seq"), Dim("one", 1)), [torch.ones(16, 1)] * 2, "order does not follow"),
        ((Dim("one", 1), Dim("batch·seq")), [torch.ones(1, 16)] * 2, "order does not follow"),
    ],
)
def test_rows_that_cannot_be_joined_are_refused(dims, tensors, reason):
    rule = survey(tensors, mesh=Mesh(("dp",), (2,)), groups=(0, 1), dims={A: dims}, weights=())
    assert reason in rule.refused


def test_flattened_rows_are_joined_and_what_all_rows_share_is_one():
    flat = [values(n).reshape(-1, 8) for n in (1, 2)]
    known = {"mesh": Mesh(("dp",), (2,)), "groups": (0, 1), "weights": ()}
    rule = survey(flat, dims={A: (Dim("batch·seq"), Dim("mlp", 8))}, **known)
    assert torch.equal(joined(rule, flat), torch.cat(flat))
    shared = [values()[0], values()[0]]
    rule = survey(shared, dims={A: (Dim("seq"), Dim("mlp", 8))}, **known)
    assert rule.placements == (Replicate(),)


# --- models without an unsharded form ----------------------------------------------------------------

NO_TWIN = {"twin": False, "weights": ()}


def test_without_an_unsharded_form_only_what_is_equal_everywhere_is_given():
    w = values()
    assert survey([w, w], **NO_TWIN).placements == (Replicate(),)
    assert "no unsharded form" in survey([w[..., :4], w[..., 4:]], **NO_TWIN).refused
    assert "only rank 1" in survey([None, w], **NO_TWIN).refused
    groups = {"mesh": DP2_TP2, "groups": (0, 0, 1, 1)}
    assert "only rank 0" in survey([values(1), None, values(2), None], **groups, **NO_TWIN).refused


def test_a_constant_is_whole_only_in_a_model_of_which_nothing_is_split():
    ones, w = torch.ones(B, S, 8), values()
    assert survey([ones, ones], more={W: [w, w]}, **NO_TWIN).placements == (Replicate(),)
    split = survey([ones, ones], more={W: [w[..., :4], w[..., 4:]]}, **NO_TWIN)
    assert "cannot be told from the whole" in split.refused
    weights = survey([ones, ones], more={W: [w, w]}, twin=False)
    assert "cannot be told from the whole" in weights.refused


def test_equal_heads_may_be_some_of_more():
    heads = torch.randn(1, 1, S, 3).expand(B, 2, S, 3).contiguous()
    dims = {A: (Dim("batch"), Dim("dim1", 2), Dim("dim2", S), Dim("feature", 3))}
    w = values()
    split = survey([heads, heads], dims=dims, more={W: [w[..., :4], w[..., 4:]]}, **NO_TWIN)
    assert "does not change along" in split.refused
    assert survey([heads, heads], dims=dims, more={W: [w, w]}, **NO_TWIN).replicated


def test_rows_are_joined_without_an_unsharded_form_too_constants_included():
    known = {"mesh": DP2_TP2, "groups": (0, 0, 1, 1), **NO_TWIN}
    pieces = [values(1), values(1), values(2), values(2)]
    assert torch.equal(joined(survey(pieces, **known), pieces), torch.cat([values(1), values(2)]))
    ones = [torch.ones(B, S, 8)] * 4
    rule = survey(ones, more={W: pieces}, **known)
    assert joined(rule, ones).shape == (2 * B, S, 8)
    assert "no known way" in survey(pieces, local={}, **known).refused


# --- DTensors ----------------------------------------------------------------------------------------


def dtensors(mesh_shape, placements, whole, locals_, *, ranks=None):
    """What ranks see of a DTensor over a mesh of all of them."""
    mesh = Mesh(tuple("abc"[: len(mesh_shape)]), mesh_shape)
    ranks = ranks or tuple(range(mesh.size))
    says = [Distributed(placements, whole, mesh_shape, mesh.coordinate(r), ranks) for r in range(mesh.size)]
    return [
        replace(note(t, t), distributed=one) if t is not None else None
        for t, one in zip(locals_, says, strict=True)
    ]


def of_dtensor(mesh_shape, placements, whole, locals_, *, groups=None, dims=None, twin=True, ranks=None):
    seen = dtensors(mesh_shape, placements, whole, locals_, ranks=ranks)
    groups = groups or (0,) * len(seen)
    names = {A: dims or DIMS}
    probe = Probe(groups, (B,) * (max(groups) + 1), S)
    mesh = Mesh(tuple("abc"[: len(mesh_shape)]), mesh_shape)
    by_site = [{A: one} if one is not None else {} for one in seen]
    return infer(Evidence(mesh, probe, by_site, (), names if twin else None, names))[A]


def test_a_dtensor_says_itself_how_it_lies():
    w = values()
    pieces = [w[..., :5], w[..., 5:]]
    rule = of_dtensor((2,), (Shard(2),), (B, S, 8), pieces)
    assert torch.equal(joined(rule, pieces), w)
    assert rule.how == "DTensor"
    for dim in (0, 1):
        parts = w.chunk(2, dim)
        rule = of_dtensor((2, 2), (Shard(dim), Replicate()), (B, S, 8), [parts[0]] * 2 + [parts[1]] * 2)
        assert torch.equal(joined(rule, [parts[0]] * 2 + [parts[1]] * 2), w)


def test_a_dtensor_may_have_pieces_of_several_groups_of_what_the_input_does_not_change():
    w = values()
    gates, ups = w[..., :4].chunk(2, -1), w[..., 4:].chunk(2, -1)
    pieces = [torch.cat(pair, -1) for pair in zip(gates, ups, strict=True)]
    rule = of_dtensor((2,), (_StridedShard(2, split_factor=2),), (B, S, 8), pieces)
    assert torch.equal(joined(rule, pieces), w)
    rows = [w[:, [0, 1, 4, 5]], w[:, [2, 3, 6, 7]]]
    by_position = of_dtensor((2,), (_StridedShard(1, split_factor=2),), (B, S, 8), rows)
    assert "a dim that follows the input" in by_position.refused
    odd = of_dtensor((2,), (_StridedShard(2, split_factor=3),), (B, S, 8), list(w.chunk(2, -1)))
    assert "3 groups of 2 equal pieces" in odd.refused


def test_a_dtensor_is_named_by_its_whole_even_where_only_parts_were_seen():
    w = values()
    local = (Dim("batch"), Dim("dim1", S), Dim("feature", 4))
    rule = of_dtensor((2,), (Shard(2),), (B, S, 8), list(w.chunk(2, -1)), dims=local, twin=False)
    assert rule.dims == (Dim("batch"), Dim("dim1", S), Dim("feature", 8))
    assert torch.equal(joined(rule, list(w.chunk(2, -1))), w)


def test_a_dtensor_over_data_ranks_holds_their_rows():
    one, two = values(1), values(2)
    pieces = [*one.chunk(2, -1), *two.chunk(2, -1)]
    rule = of_dtensor((2, 2), (Shard(0), Shard(2)), (2 * B, S, 8), pieces, groups=(0, 0, 1, 1))
    assert torch.equal(joined(rule, pieces), torch.cat([one, two]))


def test_addends_of_a_dtensor_are_added():
    parts = [values(n) for n in range(4)]
    rule = of_dtensor((2, 2), (Partial(), Partial()), (B, S, 8), parts)
    assert rule.addends == (0, 1, 2, 3)
    torch.testing.assert_close(joined(rule, parts), sum(parts))


@pytest.mark.parametrize(
    ("placements", "locals_", "reason"),
    [
        ((Shard(2),), [values()[..., :5]] * 2, "do not add up"),
        ((Replicate(),), [values()[..., :5]] * 2, "do not add up"),
        ((Replicate(),), [values(1), values(2)], "ranks 0 and 1 hold the same, and they do not"),
        ((Partial("max"),), [values(1), values(2)], "not supported"),
        ((Partial(),), [values(1), None], "never came"),
        ((Shard(2),), [values()[..., :4], None], "never came"),
    ],
)
def test_a_dtensor_that_is_not_what_it_says_is_refused(placements, locals_, reason):
    assert reason in of_dtensor((2,), placements, (B, S, 8), locals_).refused


def test_a_dtensor_of_another_shape_than_the_unsharded_models_is_refused():
    pieces = [values()[..., :2], values()[..., 2:4]]
    assert "the unsharded model" in of_dtensor((2,), (Shard(2),), (B, S, 4), pieces).refused


def test_dtensors_beside_plain_tensors_are_refused():
    known = evidence({A: [values(), values()]})
    said = Distributed((Replicate(),), (B, S, 8), (2,), (0,), (0, 1))
    known.seen[0][A] = replace(known.seen[0][A], distributed=said)
    assert "others a plain tensor" in infer(known)[A].refused


# --- what a survey measures --------------------------------------------------------------------------


def test_fingerprints_tell_tensors_apart_and_add_up():
    a, b = values(1), values(2)
    fa, fb, fsum = (torch.tensor(note(t, t).fingerprint) for t in (a, b, a + b))
    assert not torch.allclose(fa, fb, rtol=1e-3)
    assert torch.allclose(fa + fb, fsum, rtol=1e-4, atol=1e-4)
    swapped = a.flip(-1)
    assert not torch.allclose(fa, torch.tensor(note(swapped, swapped).fingerprint), rtol=1e-3)
    masked = torch.tensor([0.0, -torch.inf, torch.nan])
    assert all(math.isfinite(x) for x in note(masked, masked).fingerprint)


def test_a_module_whose_later_calls_lie_differently_is_refused():
    """A shared module sees addends of a sum first, copies of a whole tensor when it is called again."""
    part, whole = [values(1), values(2)], values(3)
    known = evidence({A: part, W: [part[0] + part[1]] * 2})
    assert not infer(known)[A].refused
    again = [{A: replace(seen[A], later=(note(whole, whole),)), W: seen[W]} for seen in known.seen]
    assert infer(replace(known, seen=again))[A].refused == CALLS
    alike = [{A: replace(seen[A], later=(seen[A],)), W: seen[W]} for seen in known.seen]
    assert infer(replace(known, seen=alike))[A] == infer(known)[A]


def test_rows_that_depend_on_each_other_are_joined_nowhere():
    rows = [values(1), values(2)]
    known = evidence({A: rows}, mesh=Mesh(("dp",), (2,)), groups=(0, 1), weights=())
    assert not infer(known)[A].refused
    assert infer(replace(known, unsteady=frozenset({A})))[A].refused == UNSTEADY


def test_a_site_of_unknown_shape_is_whole_only_where_nothing_is_split():
    same, other = [values(1)] * 2, [values(1), values(2)]
    plain = evidence({A: same}, weights=())
    unknown = {A: None}
    assert not infer(replace(plain, whole=unknown))[A].refused
    assert "in no known way" in infer(replace(plain, whole=unknown, weights=ORDERED))[A].refused
    assert "in no known way" in infer(replace(evidence({A: other}, weights=()), whole=unknown))[A].refused
    assert "no such tensor" in infer(replace(plain, whole={}))[A].refused
