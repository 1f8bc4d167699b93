"""The unsharded model without data: every site's whole shape from fake tensors, at no cost in memory."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flexmagic.engine.probe import observe
from flexmagic.engine.rows import batch_of
from flexmagic.engine.tensors import dtype_name
from flexmagic.engine.tree import Staged, kind_of, unwrapped
from flexmagic.layout.dims import PROBES, Dim, follow_rows, name_dims
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Twin:
    """Named dims of all sites, ``None`` where no rule names them, and the parameters' whole shapes."""

    sites: dict[Site, tuple[Dim, ...] | None]
    parameters: dict[str, tuple[int, ...]]

    @property
    def elements(self) -> int:
        """The number of elements of all parameters."""
        return sum(math.prod(shape) for shape in self.parameters.values())


def probe_inputs(model: nn.Module, batch: int, seq: int) -> dict[str, Any] | None:
    """A tiny input for a language model, the same on every rank; ``None`` for any other model.

    No token comes twice, if the vocabulary is large enough for that.
    """
    vocabulary = _vocabulary(model)
    if vocabulary is None:
        return None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(max(vocabulary, batch * seq), generator=generator)[: batch * seq] % vocabulary
    return {"input_ids": ids.view(batch, seq).to(device_of(model)), **forward_options(model)}


def probe_names(model: nn.Module) -> set[str] | None:
    """The names of the arguments that :func:`probe_inputs` gives."""
    return None if _vocabulary(model) is None else {"input_ids", *forward_options(model)}


def _vocabulary(model: nn.Module) -> int | None:
    """The number of tokens that a language model knows; ``None`` for any other model."""
    inner = unwrapped(model)
    size: int | None = getattr(getattr(inner, "config", None), "vocab_size", None)
    return size if getattr(inner, "main_input_name", "") == "input_ids" else None


def device_of(model: nn.Module) -> torch.device:
    """Where a model's own parameters are; the CPU for a model without."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def forward_options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that every forward of ours passes: no cache where the model has one."""
    return {"use_cache": False} if hasattr(getattr(unwrapped(model), "config", None), "use_cache") else {}


def twin_of(
    model: nn.Module, unsharded: Callable[[], nn.Module] | None, arguments: Mapping[str, Any]
) -> Twin | None:
    """Run the model's unsharded form on fake tensors, twice, with inputs of different size.

    ``unsharded`` makes it; without that, or if that cannot do without data, as when it reads a
    checkpoint, a model that can be built from its configuration alone is.
    ``None`` for any other, or for one that cannot be run without data.
    """
    inner = unwrapped(model)
    ways = [] if unsharded is None else [(unsharded, torch.get_default_dtype())]
    if getattr(inner, "config", None) is not None and probe_inputs(inner, 1, 1) is not None:
        # the shapes are the same in any dtype, but some operations know their fake form in one dtype only
        ways += [(_from_config(model), dtype) for dtype in (torch.bfloat16, torch.float32)]
    for make, dtype in ways:
        try:
            return _run_fake(make, dtype, arguments)
        except Exception as error:  # noqa: BLE001 - any model may do anything; without a twin sites are refused
            _log.debug("no unsharded form of %s in %s: %s", type(inner).__name__, dtype, error)
    return None


def shapes_of(
    model: nn.Module,
    unsharded: Callable[[], nn.Module] | None,
    arguments: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[Site, tuple[tuple[int, ...], str]]:
    """Whole shape and dtype of every site for these very arguments; empty without an unsharded form."""
    inner = unwrapped(model)
    ways = [] if unsharded is None else [(unsharded, torch.get_default_dtype())]
    if getattr(inner, "config", None) is not None and probe_inputs(inner, 1, 1) is not None:
        ways.append((_from_config(model), dtype))
    for make, made_in in ways:
        found: dict[Site, tuple[tuple[int, ...], str]] = {}

        def look(site: Site, tensor: torch.Tensor, found: dict[Site, Any] = found) -> None:
            found.setdefault(site, (tuple(tensor.shape), dtype_name(tensor.dtype)))

        try:
            with _quiet_torch(), _made_in(made_in), FakeTensorMode(allow_non_fake_inputs=True):
                fake = make().eval()
                given = {name: v.cpu() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
                observe(fake, lambda fake=fake, given=given: fake(**given), look)  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - any model may do anything
            _log.debug("no shapes of %s in %s: %s", type(inner).__name__, made_in, error)
            continue
        return found
    return {}


def _from_config(model: nn.Module) -> Callable[[], nn.Module]:
    """What makes a model of the same class anew; a stage's class is a user's own, on top of the whole's."""
    inner = unwrapped(model)
    made: Any = kind_of(inner)
    if isinstance(model, Staged):
        made = next((k for k in made.__mro__ if k.__module__.startswith("transformers.models.")), made)
    return lambda: cast("nn.Module", made(_plain(inner.config)))


def _run_fake(
    make: Callable[[], nn.Module],
    dtype: torch.dtype,
    arguments: Mapping[str, Any],
) -> Twin:
    with _quiet_torch(), _made_in(dtype), FakeTensorMode(allow_non_fake_inputs=True):
        fake = make().eval()
        config: PretrainedConfig | None = getattr(fake, "config", None)
        parameters = {name: tuple(p.shape) for name, p in fake.named_parameters()}
        if probe_inputs(fake, 1, 1) is not None and config is not None:
            ids = [torch.zeros(batch, seq, dtype=torch.long) for batch, seq in PROBES]
            first, second = (_shapes(fake, {"input_ids": i, **forward_options(fake)}) for i in ids)
            names = _constants(config)
            named = {s: name_dims(n, second[s], names) if s in second else None for s, n in first.items()}
        else:
            first, second = (_shapes(fake, _rows_of(arguments, rows)) for rows in (2, 3))
            named = {s: follow_rows(n, second[s], 2, 3) if s in second else None for s, n in first.items()}
    return Twin(named, parameters)


def _rows_of(arguments: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Empty tensors like the arguments, with a number of rows; made inside the fake mode, so without data."""
    batch = batch_of(arguments)
    return {
        name: torch.zeros(
            rows if value.ndim and len(value) == batch else len(value), *value.shape[1:], dtype=value.dtype
        )
        if isinstance(value, torch.Tensor) and value.ndim
        else value
        for name, value in arguments.items()
    }


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


def _shapes(fake: nn.Module, inputs: Mapping[str, Any]) -> dict[Site, tuple[int, ...]]:
    shapes: dict[Site, tuple[int, ...]] = {}

    def look(site: Site, tensor: torch.Tensor) -> None:
        shapes.setdefault(site, tuple(tensor.shape))

    observe(fake, lambda: fake(**inputs), look)
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
