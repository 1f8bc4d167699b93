"""The mesh as a value: coordinates, lines along an axis, and its name."""

import numpy as np
import pytest

from flexmagic.layout.mesh import Mesh


def test_a_mesh_knows_each_ranks_coordinate():
    mesh = Mesh(("dp", "tp"), (2, 3))
    assert [mesh.coordinate(r) for r in range(mesh.size)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert str(mesh) == "dp=2 × tp=3"
    with pytest.raises(ValueError, match="one size per axis"):
        Mesh(("tp",), (2, 3))


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 1, 4), (2, 2, 2)])
def test_coordinates_and_lines_are_those_of_an_array_of_ranks(shape):
    mesh = Mesh(tuple("abc"[: len(shape)]), shape)
    ranks = np.arange(mesh.size).reshape(shape)
    assert all(ranks[mesh.coordinate(rank)] == rank for rank in range(mesh.size))
    for axis, n in enumerate(shape):
        lines = np.moveaxis(ranks, axis, -1).reshape(-1, n)
        assert mesh.lines(axis) == [tuple(line) for line in lines.tolist()]


def test_the_usual_axes_stand_in_their_order_and_those_of_one_rank_are_left_out():
    assert Mesh.of(tp=2, dp=4, pp=1) == Mesh(("dp", "tp"), (4, 2))
    assert Mesh.of(fsdp=2, pp=2).axes == ("pp", "fsdp")
    assert Mesh.of() == Mesh(("tp",), (1,))
