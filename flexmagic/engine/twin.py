"""The unsharded model without data: every site's whole shape from fake tensors, at no cost in memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flexmagic.engine.probe import observe
from flexmagic.layout.dims import PROBES, name_dims
from flexmagic.layout.sites import Site
from flexmagic.layout.survey import Expected

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Twin:
    """Whole shapes of all sites under the first probe, and of all parameters."""

    sites: dict[Site, Expected]
    parameters: dict[str, tuple[int, ...]]


def probe_inputs(model: nn.Module, batch: int, seq: int) -> dict[str, Any] | None:
    """A tiny input for a language model, the same on every rank; ``None`` for any other model."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None or getattr(model, "main_input_name", "") != "input_ids":
        return None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (batch, seq), generator=generator)
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), **forward_options(model)}


def forward_options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that every forward of ours passes: no cache where the model has one."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def twin_of(model: nn.Module) -> Twin | None:
    """Run the model's unsharded form on fake tensors with both probes.

    ``None`` for a model that cannot be built from its configuration alone.
    """
    config = getattr(model, "config", None)
    if config is None or probe_inputs(model, 1, 1) is None:
        return None
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = type(model)(_plain(config)).eval()
        shapes = [_shapes(fake, batch, seq) for batch, seq in PROBES]
        parameters = {name: tuple(p.shape) for name, p in fake.named_parameters()}
    names = _constants(config)
    sites = {
        site: Expected(shape, name_dims(shape, shapes[1][site], names) if site in shapes[1] else None)
        for site, shape in shapes[0].items()
    }
    return Twin(sites, parameters)


def _plain(config: PretrainedConfig) -> PretrainedConfig:
    plain = copy.deepcopy(config)
    if hasattr(plain, "distributed_config"):
        del plain.distributed_config
    return plain


def _shapes(fake: nn.Module, batch: int, seq: int) -> dict[Site, tuple[int, ...]]:
    shapes: dict[Site, tuple[int, ...]] = {}
    inputs = {"input_ids": torch.zeros(batch, seq, dtype=torch.long), **forward_options(fake)}

    def look(site: Site, tensor: torch.Tensor) -> None:
        shapes.setdefault(site, tuple(tensor.shape))

    observe(fake, inputs, look)
    return shapes


def _constants(config: PretrainedConfig) -> dict[str, int]:
    """The model's own constants by the names this field uses for them."""
    wanted = {
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "mlp": "intermediate_size",
        "head_dim": "head_dim",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
    }
    found = {name: getattr(config, attribute, None) for name, attribute in wanted.items()}
    return {name: size for name, size in found.items() if isinstance(size, int)}
