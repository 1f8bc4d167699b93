"""How the arguments of verbs travel."""

from __future__ import annotations

import pickle

import pytest
import torch

from flexmagic.client import engine_side


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).view(2, 3).t(),
        torch.tensor(2.5, dtype=torch.float64),
        torch.ones(3, dtype=torch.bfloat16),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]).conj(),
    ],
)
def test_tensors_travel_as_they_are(tensor):
    ((found,), named) = pickle.loads(engine_side.packed((tensor,), {"at": [tensor]}))  # noqa: S301 - packed here
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)
    assert torch.equal(named["at"][0], tensor)
    if found.numel():
        found.zero_()  # it can be written to, and is nobody else's
        assert tensor.any()
