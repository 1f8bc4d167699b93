"""Parameters joined from the ranks' parts: torch's own sharding on simulated ranks is the oracle."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from flexmagic.engine.checkpoint import merged
from flexmagic.engine.probe import note
from flexmagic.errors import LayoutError
from flexmagic.layout.assemble import assemble
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.parameters import parameter_layout
from flexmagic.layout.seen import Distributed, WeightSplit

TP2, DP2_TP2 = Mesh(("tp",), (2,)), Mesh(("dp", "tp"), (2, 2))


def on_each_rank(mesh, make):
    """What ``make`` returns as each rank of a process group in which nothing is sent: (local, seen)."""
    out, n = {}, mesh.size
    for rank in range(n):
        dist.init_process_group("fake", rank=rank, world_size=n, store=FakeStore())
        try:
            tensor = make()
            local = tensor.to_local().detach().clone()
            seen = note(local, tensor)
            # torch keeps meshes and specs, and with them the coordinate of the rank that made them first
            said = replace(seen.distributed, coordinate=mesh.coordinate(rank))
            out[rank] = local, replace(seen, distributed=said)
        finally:
            dist.destroy_process_group()
    return out


def whole_of(mesh, made):
    layout = parameter_layout(mesh, "w", {rank: seen for rank, (_, seen) in made.items()})
    return layout, assemble(layout, {rank: local for rank, (local, _) in made.items()})


def weight(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize("shape", [(8, 4), (5, 7), (3, 2), (1, 4), (9, 9)])
@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((2,), (Shard(0),)),
        ((4,), (Shard(1),)),
        ((8,), (Shard(0),)),
        ((2, 2), (Shard(0), Shard(1))),
        ((2, 2), (Replicate(), Shard(0))),
        ((2, 3), (Shard(1), Replicate())),
        ((2, 4), (Shard(0), Shard(0))),
        ((2, 2, 2), (Shard(0), Replicate(), Shard(1))),
        ((2, 2, 2), (Shard(1), Shard(0), Shard(1))),
    ],
)
def test_what_torch_distributes_is_joined(shape, mesh, placements):
    names = tuple("abc"[: len(mesh)])
    ours = Mesh(names, mesh)

    def make():
        device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
        return distribute_tensor(weight(*shape), device_mesh, placements, src_data_rank=None)

    made = on_each_rank(ours, make)
    layout, whole = whole_of(ours, made)
    assert torch.equal(whole, weight(*shape))
    assert len(layout.owners()) <= ours.size
    assert any(local.shape != whole.shape for local, _ in made.values())


@pytest.mark.parametrize(("ranks", "groups", "length"), [(2, 2, 8), (3, 2, 12), (4, 3, 24)])
@pytest.mark.parametrize("dim", [0, 1])
def test_pieces_of_several_groups_are_joined(ranks, groups, length, dim):
    """As where two projections are fused into one weight: a rank has its piece of each."""
    whole = weight(length, 3) if dim == 0 else weight(3, length)
    ours = Mesh(("tp",), (ranks,))

    def make():
        mesh = init_device_mesh("cpu", (ranks,))
        pieces = (
            whole.unflatten(dim, (groups, ranks, -1)).select(dim + 1, dist.get_rank()).flatten(dim, dim + 1)
        )
        placement = _StridedShard(dim, split_factor=groups)
        return DTensor.from_local(pieces, mesh, [placement], shape=whole.shape, stride=whole.stride())

    made = on_each_rank(ours, make)
    layout, joined = whole_of(ours, made)
    assert torch.equal(joined, whole)
    assert all(len(block[dim]) == groups for block in layout.blocks)
    if ranks == 2:
        local, said = made[0]
        longer = tuple(n + 1 if at == dim else n for at, n in enumerate(whole.shape))
        odd = replace(said, distributed=replace(said.distributed, whole=longer))
        with pytest.raises(LayoutError, match=r"do not add up|different placements"):
            parameter_layout(ours, "w", {0: odd, 1: made[1][1]})
        assert local.shape != whole.shape


@pytest.mark.parametrize("rows", [8, 6, 7])
@pytest.mark.parametrize("dim", [0, 1])
def test_what_is_sharded_on_top_of_tensor_parallelism_is_joined(rows, dim):
    def make():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        module = nn.Linear(4, rows, bias=False)
        split = distribute_tensor(weight(rows, 4), mesh["tp"], [Shard(dim)], src_data_rank=None)
        module.weight = nn.Parameter(split)
        fully_shard(module, mesh=mesh["dp"])
        return module.weight

    made = on_each_rank(DP2_TP2, make)
    layout, whole = whole_of(DP2_TP2, made)
    assert torch.equal(whole, weight(rows, 4))
    assert layout.owners() == (0, 1, 2, 3)
    if dim == 0:
        places = [seen.distributed.placements for _, seen in made.values()]
        assert type(places[0][0]).__name__ == "_StridedShard"  # what makes the order unlike the mesh's


@pytest.mark.parametrize("rows", [(6, 5), (1, 3), (4, 4)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("interleaved", [False, True])
def test_plain_parts_that_are_sharded_once_more_are_joined(rows, dim, interleaved):
    own, other = rows if dim == 0 else (4, 4)
    whole = weight(own + other if dim == 0 else 5, 4 if dim == 0 else 8)
    length = whole.shape[dim]
    order = [*range(0, length, 2), *range(1, length, 2)] if interleaved else [*range(length)]
    mine = order[:own], order[own:]
    spans = [merged(indices) for indices in mine]
    made = {}
    for tp in range(2):
        part = whole.index_select(dim, torch.tensor(mine[tp]))
        for fsdp, piece in enumerate(_chunks(part)):
            said = Distributed((Shard(0),), tuple(part.shape), (2,), (fsdp,), (tp, 2 + tp))
            made[2 * fsdp + tp] = piece, replace(note(piece, piece), distributed=said)
    held = [WeightSplit("", dim, length, (*spans, *spans), "w")]
    parts = {rank: seen for rank, (_, seen) in made.items()}
    layout = parameter_layout(DP2_TP2, "w", parts, tuple(whole.shape), held)
    assert torch.equal(assemble(layout, {rank: local for rank, (local, _) in made.items()}), whole)
    for nothing in ([], [WeightSplit("", dim, length, (*spans, None, spans[1]), "w", "rank 2 is odd")]):
        with pytest.raises(LayoutError, match="do not say how they join"):
            parameter_layout(DP2_TP2, "w", parts, tuple(whole.shape), nothing)


def _chunks(part):
    """A tensor's two shards along dim 0, as DTensor cuts it: the second may be shorter, or empty."""
    at = -(-len(part) // 2)
    return part[:at], part[at:]


def seen(*tensors):
    return {rank: note(t, t) for rank, t in enumerate(tensors)}


def test_plain_parts_are_whole_if_all_are_the_same():
    w = weight(3, 2)
    layout = parameter_layout(TP2, "w", seen(w, w))
    assert layout.replicated
    assert layout.owners() == (0,)
    alone = parameter_layout(TP2, "w", {1: note(w, w)})
    assert alone.ranks == (1,)
    assert torch.equal(assemble(alone, {1: w}), w)


@pytest.mark.parametrize("parts", [(weight(3, 2), weight(3, 2) + 1), (weight(3, 2), weight(2, 2))])
def test_plain_parts_that_differ_are_refused(parts):
    with pytest.raises(LayoutError, match="do not say how they join"):
        parameter_layout(TP2, "w", seen(*parts))


def test_plain_parts_whose_places_are_known_are_joined():
    whole = weight(5, 2)
    spans = (((0, 1), (3, 5)), ((1, 3),))
    parts = whole[[0, 3, 4]], whole[1:3]
    layout = parameter_layout(TP2, "w", seen(*parts), (5, 2), [WeightSplit("", 0, 5, spans, "w")])
    assert torch.equal(assemble(layout, dict(enumerate(parts))), whole)
    strange = WeightSplit("", 0, 5, (spans[0], None), "w", "rank 1 holds values that are not there")
    with pytest.raises(
        LayoutError, match=r"do not say how they join: rank 1 holds values that are not there\."
    ):
        parameter_layout(TP2, "w", seen(*parts), (5, 2), [strange])


def test_equal_parts_of_a_constant_are_whole_only_where_the_whole_shape_is_known():
    zeros = torch.zeros(4)
    with pytest.raises(LayoutError, match="cannot be told from the whole"):
        parameter_layout(TP2, "bias", seen(zeros, zeros))
    with pytest.raises(LayoutError, match=r"which is \(8,\)"):
        parameter_layout(TP2, "bias", seen(zeros, zeros), (8,))
    assert parameter_layout(TP2, "bias", seen(zeros, zeros), (4,)).replicated
    assert parameter_layout(Mesh(("dp",), (2,)), "bias", seen(zeros, zeros)).replicated


def test_dtensors_beside_plain_tensors_and_untrue_copies_are_refused():
    def make(value=0.0):
        return distribute_tensor(
            weight(3, 2) + value, init_device_mesh("cpu", (2,)), [Replicate()], src_data_rank=None
        )

    made = {rank: seen for rank, (_, seen) in on_each_rank(TP2, make).items()}
    assert parameter_layout(TP2, "w", made).replicated
    with pytest.raises(LayoutError, match="others as a plain tensor"):
        parameter_layout(TP2, "w", {**made, 1: note(weight(3, 2), weight(3, 2))})
    other = on_each_rank(TP2, lambda: make(1.0))[1][1]
    with pytest.raises(LayoutError, match="ranks 0 and 1 hold the same, and they do not"):
        parameter_layout(TP2, "w", {**made, 1: other})
