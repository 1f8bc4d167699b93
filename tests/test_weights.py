"""Where the parts of one module's weights stand in the whole ones."""

import torch
from torch import nn

from flexmagic.engine.checkpoint import Unsharded
from flexmagic.engine.weights import find, local_weights

WHOLE = torch.arange(24.0).reshape(6, 4)


def held(whole, **parts):
    """What is found of a rank's parts, along their first dim, of the weights of one module."""
    parameters = {f"m.{name}": part for name, part in parts.items()}
    shapes = {name: whole.shape(name) for name in parameters}
    weights = [w for name, part in parameters.items() for w in local_weights(name, part, shapes[name])]
    return {found.weight.name: found for found in find(weights, parameters, whole)}


def module(bias):
    out = nn.ModuleDict({"m": nn.Linear(4, 6)})
    with torch.no_grad():
        out["m"].weight.copy_(WHOLE)
        out["m"].bias.copy_(bias)
    return Unsharded(lambda: out)


def test_a_bias_of_zeros_stands_where_the_weight_of_its_module_does():
    picked = [1, 3, 5]
    found = held(module(torch.zeros(6)), weight=WHOLE[picked], bias=torch.zeros(3))
    assert found["m.bias"].spans == found["m.weight"].spans == ((1, 2), (3, 4), (5, 6))
    assert not found["m.bias"].why


def test_a_part_that_is_not_in_the_whole_is_named():
    odd = held(module(torch.arange(6.0)), weight=WHOLE[:3], bias=torch.full((3,), 9.0))["m.bias"]
    assert odd.spans is None
    assert odd.why == "holds values of m.bias that the unsharded form does not have"
    twice = held(module(torch.zeros(6)), bias=torch.zeros(3))["m.bias"]
    assert twice.why == "holds values of m.bias that stand more than once in the unsharded form"
    beside = held(module(torch.zeros(6)), weight=WHOLE[:3], bias=torch.ones(3))["m.bias"]
    assert "does not have" in beside.why
