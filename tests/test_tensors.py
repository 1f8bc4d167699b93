from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from flexmagic.engine.tensors import apart, checksum, leaves, replace_leaf, together


@dataclass(frozen=True)
class Picks:
    values: Any
    rest: Any = None


class Pair(NamedTuple):
    left: Any
    right: Any


A, B, C = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)


def test_leaves_are_the_tensors_and_the_way_to_each():
    value = (A, None, {"k": [B, "text"], "not a name": A}, Pair(C, object()))
    assert [(where, t.item()) for where, t in leaves(value)] == [("[0]", 0), ("[2].k[0]", 1), ("[3][0]", 2)]
    assert [where for where, _ in leaves(A)] == [""]
    assert list(leaves(object())) == []
    assert [where for where, _ in leaves(Picks(A, {"k": B}))] == [".values", ".rest.k"]
    assert list(leaves(Picks)) == []


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (A, ""),
        ((A, B), "[1]"),
        ([A, (B,)], "[1][0]"),
        (Pair(A, B), "[1]"),
        (Picks(A, (B, C)), ".rest[1]"),
        (OrderedDict(logits=A, hidden=(B, C)), ".hidden[1]"),
    ],
)
def test_replacing_a_leaf_changes_nothing_else(value, where):
    before = list(leaves(value))
    new = torch.full((1,), 9.0)
    changed = replace_leaf(value, where, new)
    assert type(changed) is type(value)
    assert dict(leaves(changed))[where] is new
    assert all(t is dict(leaves(changed))[w] for w, t in before if w != where)
    assert list(leaves(value)) == before


def test_a_model_output_keeps_its_class():
    from transformers.modeling_outputs import CausalLMOutputWithPast

    output = CausalLMOutputWithPast(logits=A, hidden_states=(B, C))
    changed = replace_leaf(output, ".logits", C)
    assert isinstance(changed, CausalLMOutputWithPast)
    assert changed.logits is C
    assert changed["logits"] is C
    assert output.logits is A


@pytest.mark.parametrize("size", [37, 40_003])  # what is long is added up in another way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
def test_checksums_are_equal_for_equal_bits_and_differ_otherwise(dtype, size):
    x = (torch.arange(size) % 5).to(dtype)
    assert checksum(x) == checksum(x.clone())
    for at in (5, size - 1):
        other = x.clone()
        other[at] = ~other[at] if dtype == torch.bool else other[at] + 1
        assert checksum(x) != checksum(other)
    swapped = torch.cat([x[8:], x[:8]])
    assert checksum(x) != checksum(swapped)
    assert checksum(torch.empty(0, 3)) == (0, 0)


def test_contexts_travel_together_and_come_apart_as_they_were():
    x = torch.arange(6.0).reshape(2, 3)
    contexts = [
        {"a": x + n, "b": n, "c": x[:n], "d": (x + n).bfloat16(), **({"e": x} if n else {})} for n in range(3)
    ]
    stacked, rest = together(contexts)
    assert set(stacked) == {"a", "d"}
    for one, other in zip(apart(stacked, rest), contexts, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(torch.as_tensor(one[n]), torch.as_tensor(other[n])) for n in one)
        assert one["d"].dtype == torch.bfloat16
    assert apart(*together([])) == []
