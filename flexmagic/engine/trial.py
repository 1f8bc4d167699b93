"""A forward with a loss on which derivatives are tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flexmagic.engine.distributed import Loaded
from flexmagic.engine.exchange import Exchange
from flexmagic.engine.loss import Outputs, outputs_of
from flexmagic.engine.tensors import leaves
from flexmagic.errors import ModelError
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site


@dataclass
class Trial:
    """A forward with a loss that can be repeated, also with one site changed."""

    loaded: Loaded
    rules: Mapping[Site, Rule]
    exchange: Exchange
    arguments: dict[str, Any]
    groups: int

    def loss(self) -> torch.Tensor:
        """A fixed random projection of the model's whole output."""
        return self.outcome().loss

    def outcome(self) -> Differentiable:
        """The loss, and what it takes to differentiate it."""
        outputs = outputs_of(self.loaded.model, self.arguments, self.rules, self.exchange, {})
        generator = torch.Generator().manual_seed(2)
        total = None
        for _, tensor in leaves(outputs.whole):
            if tensor.is_floating_point():
                weights = torch.randn(tensor.shape, generator=generator).to(tensor)
                part = (tensor * weights).sum() / tensor.numel() ** 0.5
                total = part if total is None else total + part
        if total is None:
            msg = (
                "The model returns nothing of which the whole is known, so there is no loss to differentiate."
            )
            raise ModelError(msg)
        return Differentiable(total, outputs)


@dataclass(frozen=True)
class Differentiable:
    """A loss on a forward's outputs."""

    loss: torch.Tensor
    outputs: Outputs

    def backward(self) -> None:
        """Differentiate it, through all stages of a pipeline."""
        self.loss.backward()
        if self.outputs.back is not None:
            self.outputs.back()
