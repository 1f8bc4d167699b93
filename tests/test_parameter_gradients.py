"""How gradients of parameters lie: what equal parts on all ranks may and may not be taken for."""

from dataclasses import replace

import torch

from flexmagic.engine.probe import note
from flexmagic.layout.assemble import assemble
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.parameter_gradients import Found, parameter_gradient_rule, without_tied
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


def staged(stages, *tensors):
    """The rule of a parameter that ranks of these stages have."""
    seen = [{} if tensor is None else {SITE: note(tensor, tensor)} for tensor in tensors]
    groups = (0,) * len(tensors)
    return parameter_gradient_rule(SITE, Mesh.of(pp=len(tensors)), seen, groups, (2, 4), stages)


def test_what_several_pipeline_stages_use_has_the_sum_of_their_gradients():
    gradient = torch.arange(8.0).reshape(2, 4)
    alone = staged((0, 1), gradient, None).rule
    assert (alone.ranks, alone.addends) == ((0,), ())
    for other in (gradient, gradient + 1):
        rule = staged((0, 1), gradient, other).rule
        layout = rule.local_layout([(2, 4), (2, 4)])
        assert torch.equal(assemble(layout, {0: gradient, 1: other}), gradient + other)
    shared = staged((0, 0, 2, 2), gradient, gradient, gradient + 1, gradient + 1).rule
    layout = shared.local_layout([(2, 4)] * 4)
    pieces = {rank: gradient + rank // 2 for rank in layout.owners()}
    assert torch.equal(assemble(layout, pieces), 2 * gradient + 1)


def test_a_matrix_that_may_be_tied_to_one_of_another_stage_is_refused():
    found = staged((0, 1), torch.ones(2, 4), None)
    head = Site("head.weight", "grad")
    both = {SITE: found, head: Found(replace(found.rule, site=head))}
    assert without_tied(both, {SITE.path: (2, 4), head.path: (2, 4)}) == both
    refused = without_tied(both, {SITE.path: (2, 4)})
    assert all("under another name" in its.rule.refused for its in refused.values())
