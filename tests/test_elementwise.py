"""Which bodies do the same to every element, and that pieces are then left with parts of the whole."""

import pytest
import torch

from flexmagic.engine.active_hook import ActiveHook
from flexmagic.engine.code import NAMES, HookSource, build
from flexmagic.engine.elementwise import is_elementwise
from flexmagic.engine.exchange import Exchange
from flexmagic.engine.limits import Limits
from flexmagic.engine.site_value import SiteValue
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site

ARE = [
    "x *= 0.5",
    "x = x * 0.5 + 1",
    "return -x ** 2 / 3",
    "x += 1\nx *= x > 0",
    "y = x * 2\nx -= y",
    "y = z = x * 2\nreturn (y + z) // 3 % 5",
]
ARE_NOT = [
    "",
    "x @= x",
    "x[:, -1] *= 0.5",
    "x -= x.mean()",
    "x *= torch.rand(1)",
    "x = x * scale",
    "x *= rank",
    "if x > 0:\n    x *= 2",
    "x *= 2 if x > 0 else 1",
    "x *= 0 < x < 1",
    "x = x and 1",
    "x = not x",
    "y.z = x",
    "a, b = x",
    "for y in x: x *= 2",
    "x *= 'a'",
    "x = lambda: 1",
    "x *= y\ny = x",
    "x *= 2; print(x)",
    "x *= (",
    "return",
]


@pytest.mark.parametrize("text", ARE)
def test_pieces_are_left_with_what_is_left_of_the_whole(text):
    assert is_elementwise(text)
    call = build(HookSource("h", 1, text), {"torch": torch})
    names = dict.fromkeys(NAMES)
    whole = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    pieces = [whole[:, :3].clone(), whole[:, 3:].clone()]
    left = [call({**names, "x": x}) for x in (whole.clone(), *pieces)]
    assert not torch.equal(left[0], whole)
    assert torch.equal(torch.cat(left[1:], 1), left[0])


@pytest.mark.parametrize("text", ARE_NOT)
def test_what_looks_at_more_than_one_element_or_elsewhere_is_none(text):
    assert not is_elementwise(text)


def _rule(**more):
    dims = (Dim("batch"), Dim("feature", 8))
    return Rule(Site("m"), dims, "float32", Mesh(("tp",), (2,)), ranks=(0, 1), **more)


def test_pieces_are_edited_unless_they_are_addends_or_refused_or_the_whole_is_here():
    x = torch.ones(3, 8)
    with torch.no_grad():
        assert SiteValue(_rule(), Exchange(None, 0), x).may_be_apart
        assert not SiteValue(_rule(addends=(0, 1)), Exchange(None, 0), x).may_be_apart
        assert not SiteValue(_rule(row_addends=(0, 1)), Exchange(None, 0), x).may_be_apart
        assert not SiteValue(_rule(refused="nobody knows"), Exchange(None, 0), x).may_be_apart
        edited = SiteValue(_rule(), Exchange(None, 0), x)
        edited.put_whole(x * 2)
        assert not edited.may_be_apart
    assert not SiteValue(_rule(), Exchange(None, 0), x).may_be_apart  # gradients go the ways of the whole


def test_hooks_of_other_kinds_get_the_whole():
    def hook(**more):
        return ActiveHook(HookSource("h", 1, "x *= 2", **more), lambda _names: None, frozenset())

    assert hook().elementwise
    assert not hook(boxed=True).elementwise
    assert not hook(function=lambda x, h: x * 2).elementwise
    assert not hook(limits=Limits.read(token="-1")).elementwise
