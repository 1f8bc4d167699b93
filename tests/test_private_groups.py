"""Process groups listed and made again, in processes of their own; fails if torch changes what is read."""

import json
import socket
import subprocess
import sys

import pytest

PREAMBLE = """
import json, sys, weakref
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from flexmagic.engine.groups import OWN, Groups, Meeting, Place
from flexmagic.engine.private_groups import GroupSpec, handed_out, known_groups, make_group

rank, size, *ports = map(int, sys.argv[1:])
place = Place(rank, size, torch.device("cpu"))
meetings = [Meeting("127.0.0.1", port, 1 + number) for number, port in enumerate(ports)]

def summed(group):
    x = torch.tensor([2.0**rank])
    dist.all_reduce(x, group=group)
    return float(x)

def specs():
    return [[s.name, list(s.ranks), s.backend, s.description] for s in groups.specs()]

"""


def told(code, size=2, generations=2):
    """What each of some ranks prints as JSON in the end; none may fail."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(generations)]
    ports = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, str(rank), str(size), *ports],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    done = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(err for _, err in done)
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


AGAIN = """
from flexmagic.client.recovery import together

groups = Groups(place, meetings[0])
mesh = init_device_mesh("cpu", SHAPE, mesh_dim_names=("pp", "tp"))
extra = dist.new_group([1, 0], sort_ranks=False) if size == 2 else dist.new_group([3, 1], sort_ranks=False)
ddp = nn.parallel.DistributedDataParallel(nn.Linear(1, 1, bias=False), process_group=mesh["pp"].get_group())
keeps = [mesh.get_group("tp")]
before = specs(), summed(mesh.get_group("pp")), summed(mesh.get_group("tp")), summed(keeps[0])
olds = [  # an id may be another object's by now, and a reference would be given the new one
    weakref.ref(old) for old in (mesh.get_group("pp"), mesh.get_group("tp"), dist.group.WORLD, groups.own)
]

everyone = [None] * size
dist.all_gather_object(everyone, groups.specs())
left = groups.rebuild(meetings[1], together(everyone))

assert not any(old() is g for old in olds for g in known_groups().values())
assert keeps[0] is mesh.get_group("tp")
assert ddp.process_group is mesh.get_group("pp")
after = specs(), summed(mesh.get_group("pp")), summed(mesh.get_group("tp")), summed(keeps[0])
own = next(spec for spec, group in known_groups().items() if group is groups.own)
ddp(torch.ones(1, 1) * (1 + mesh.get_local_rank("pp"))).sum().backward()  # its reducer meets in the new group
gradient = float(ddp.module.weight.grad)
print(json.dumps([before, after, own.description == OWN, gradient, groups.meeting.generation]))
"""


@pytest.mark.parametrize(("size", "shape"), [(2, (2, 1)), pytest.param(4, (2, 2), marks=pytest.mark.full)])
def test_groups_of_a_mesh_are_made_again_under_their_names(size, shape):
    ranks = told(AGAIN.replace("SHAPE", repr(shape)), size)
    for rank, (before, after, own, gradient, generation) in enumerate(ranks):
        assert before == after
        assert own
        assert generation == 2
        assert gradient == 1.5  # the mean of 1 and 2
        assert before[1] == sum(2.0**r for r in range(size) if r % shape[1] == rank % shape[1])
        assert before[2] == sum(2.0**r for r in range(size) if r // shape[1] == rank // shape[1])
    ours = {tuple(ranks) for _, ranks, _, _ in ranks[1][0][0]}
    assert ((1, 0) if size == 2 else (3, 1)) in ours  # ranks keep a group's own order


LISTED = """
groups = Groups(place, meetings[0])
listed = {spec.name: spec for spec in known_groups()}
made = make_group(GroupSpec("7", (0, 1), "gloo", "seventh"))
print(json.dumps([
    sorted(listed), listed["0"].ranks, listed["1"].description, known_groups() and made.group_name,
    [spec.name for spec in known_groups()], summed(made), dist.new_group([0, 1]).group_name,
    make_group(GroupSpec("9", (1,), "gloo", "")) is None,
]))
"""


def test_torch_still_names_groups_by_counting_and_lists_them_where_we_read():
    for rank, said in enumerate(told(LISTED, generations=1)):
        assert said[:4] == [["0", "1"], [0, 1], "flexmagic exchanges", "7"]
        assert said[4] == ["0", "1", "7"]
        assert said[5:7] == [3.0, "8"]
        assert said[7] == (rank == 0)


HANDED = """
groups = Groups(place, meetings[0])
mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
names = [spec.name for spec in groups.specs() if spec.description != OWN]
usual = dist.new_group
with handed_out(names, ()):
    again = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    try:
        dist.new_group([0, 1])
        refused = ""
    except RuntimeError as error:
        refused = str(error)
same = [again.get_group(axis) is mesh.get_group(axis) for axis in ("a", "b")]
print(json.dumps([same, refused, dist.new_group is usual, len(known_groups())]))
"""


def test_groups_that_are_there_are_handed_out_in_turn_instead_of_new_ones():
    for same, refused, put_back, count in told(HANDED, generations=1):
        assert same == [True, True]
        assert "of ranks (0, 1) is asked for, which the other ranks do not have" in refused
        assert put_back
        assert count >= 3
