"""How gradients of parameters lie: what equal parts on all ranks may and may not be taken for."""

import torch

from flexmagic.engine.probe import note
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.parameter_gradients import parameter_gradient_rule
from flexmagic.layout.sites import Site

SITE = Site("up.weight", "grad")


def found(*tensors, whole):
    seen = [{SITE: note(tensor, tensor)} for tensor in tensors]
    return parameter_gradient_rule(SITE, Mesh.of(tp=len(tensors)), seen, (0,) * len(tensors), whole).rule


def test_equal_gradients_of_the_whole_parameter_are_copies():
    gradient = torch.arange(8.0).reshape(2, 4)
    assert not found(gradient, gradient, whole=(2, 4)).refused


def test_equal_gradients_of_parts_are_not_taken_for_the_whole():
    part = torch.zeros(2, 4)
    assert "own part" in found(part, part, whole=(4, 4)).refused


def test_where_the_whole_is_not_known_equal_ones_are_copies_and_others_refused():
    gradient = torch.arange(8.0).reshape(2, 4)
    assert not found(gradient, gradient, whole=None).refused
    assert found(gradient, gradient + 1, whole=None).refused
