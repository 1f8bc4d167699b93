"""Which bodies do the same to every element, and that pieces are then left with parts of the whole."""

import pytest
import torch

from flexmagic.engine.code import NAMES, HookSource, build
from flexmagic.engine.elementwise import is_elementwise

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
