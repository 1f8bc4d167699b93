"""Parameters joined from the ranks' parts: torch's own sharding on simulated ranks is the oracle."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from flexmagic.engine.probe import note
from flexmagic.errors import LayoutError
from flexmagic.layout.assemble import assemble
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.parameters import parameter_layout
from flexmagic.layout.seen import WeightSplit

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
