"""Taking apart and joining against torch's own DTensors, on up to eight ranks simulated in this process."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from flexmagic.engine.probe import note
from flexmagic.layout.assemble import assemble, split
from flexmagic.layout.decide import Decision, from_distributed
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.seen import Distributed
from flexmagic.layout.sites import Site

local_tensor = pytest.importorskip("torch.distributed._local_tensor")

MESHES = [(2,), (3,), (5,), (8,), (2, 2), (2, 3), (4, 2), (2, 2, 2)]


@st.composite
def distributions(draw):
    """A mesh, a shape, and two ways of lying on the mesh: one to start with, one to move to."""
    mesh = draw(st.sampled_from(MESHES))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    shards = st.integers(0, len(shape) - 1).map(Shard)
    start = tuple(draw(st.one_of(st.just(Replicate()), shards)) for _ in mesh)
    goal = tuple(draw(st.one_of(st.just(Replicate()), shards)) for _ in mesh)
    return mesh, shape, start, goal


def on_simulated_ranks(mesh, make):
    """What ``make`` returns of each rank: its local tensor, and what the DTensor says of itself there."""
    ours = Mesh(tuple("abc"[: len(mesh)]), mesh)
    dist.init_process_group("fake", rank=0, world_size=ours.size, store=FakeStore())
    try:
        with local_tensor.LocalTensorMode(ours.size):
            tensor = make(init_device_mesh("cpu", mesh, mesh_dim_names=ours.axes))
            local = tensor.to_local()
            # what is the same everywhere may be a plain tensor
            locals_ = getattr(local, "_local_tensors", dict.fromkeys(range(ours.size), local))
        said = tuple(tensor.placements), tuple(int(n) for n in tensor.shape), mesh
        return ours, [
            (locals_[rank], Distributed(*said, ours.coordinate(rank), tuple(range(ours.size))))
            for rank in range(ours.size)
        ]
    finally:
        dist.destroy_process_group()


def layout_of(ours, made):
    seen = {rank: replace(note(local, local), distributed=said) for rank, (local, said) in enumerate(made)}
    dims = tuple(Dim(f"dim{at}") for at in range(made[0][0].ndim))
    found = from_distributed(Decision(tuple(seen), dims, "float32"), seen)
    assert not found.refused
    return found.rule(Site("x"), ours).local_layout([tuple(local.shape) for local, _ in made])


@settings(max_examples=60, deadline=None)
@given(distributions(), st.sampled_from(["distributed", "moved", "summed"]))
def test_what_torch_distributes_moves_and_adds_up_is_what_the_layout_says(case, way):
    mesh, shape, start, goal = case
    whole = torch.arange(1.0, math.prod(shape) + 1).reshape(shape)

    def make(device_mesh):
        tensor = distribute_tensor(whole, device_mesh, start, src_data_rank=None)
        moved = tensor.redistribute(device_mesh, goal) if way == "moved" else tensor
        return moved.sum(0) if way == "summed" else moved

    ours, made = on_simulated_ranks(mesh, make)
    layout = layout_of(ours, made)
    expected = whole.sum(0) if way == "summed" else whole
    assert layout.shape == expected.shape
    assert torch.equal(assemble(layout, {rank: local for rank, (local, _) in enumerate(made)}), expected)
    assert layout.partial == (way == "summed" and Shard(0) in start)
    own = {rank: split(layout, rank, expected) for rank in range(ours.size)}
    assert torch.equal(assemble(layout, own), expected)
    for rank, (local, _) in enumerate(made):
        assert own[rank].shape == local.shape
        assert layout.partial or torch.equal(own[rank], local)
