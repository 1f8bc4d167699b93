"""The unsharded model without data: every site's whole shape from fake tensors, at no cost in memory."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
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


_log = logging.getLogger(__name__)


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

    ``None`` for a model that cannot be built from its configuration alone, or not run without data.
    """
    config = getattr(model, "config", None)
    if config is None or probe_inputs(model, 1, 1) is None:
        return None
    # the shapes are the same in any dtype, but some operations know their fake form in one dtype only
    for dtype in (torch.bfloat16, torch.float32):
        try:
            return _run_fake(model, config, dtype)
        except Exception as error:  # noqa: BLE001 - any model may do anything; without a twin sites are refused
            _log.debug("no unsharded form of %s in %s: %s", type(model).__name__, dtype, error)
    return None


def _run_fake(model: nn.Module, config: PretrainedConfig, dtype: torch.dtype) -> Twin:
    with _quiet_torch(), _made_in(dtype), FakeTensorMode(allow_non_fake_inputs=True):
        fake = type(model)(_plain(config)).eval()
        shapes = [_shapes(fake, batch, seq) for batch, seq in PROBES]
        parameters = {name: tuple(p.shape) for name, p in fake.named_parameters()}
    names = _constants(config)
    sites = {
        site: Expected(shape, name_dims(shape, shapes[1][site], names) if site in shapes[1] else None)
        for site, shape in shapes[0].items()
    }
    return Twin(sites, parameters)


@contextlib.contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Let modules be made in a dtype."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep torch from printing a traceback of what is caught here."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


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
