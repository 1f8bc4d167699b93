"""A stage of a pipeline as if it were the whole model: for code that calls it, as ``generate`` does."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flexmagic.engine.kv_cache import cache_in, name_in
from flexmagic.engine.loss import LOGITS
from flexmagic.engine.messages import MOST_TENSORS
from flexmagic.engine.pipeline import Pipeline
from flexmagic.engine.stage_output import from_the_last, of_output, with_output
from flexmagic.engine.tensors import detached, leaves
from flexmagic.engine.tree import unwrapped
from flexmagic.engine.twin import forward_options
from flexmagic.errors import InputError

OF_ALL_LAYERS = frozenset({"output_attentions", "output_hidden_states", "output_router_logits"})
"""Options by which a model returns something of every layer."""


def whole_of(
    pipeline: Pipeline,
    begin: Callable[[dict[str, Any]], None] = lambda _arguments: None,
    end: Callable[[], None] = lambda: None,
    form: nn.Module | None = None,
) -> Any:
    """The stage's model as the whole one: its forward is that of all stages, and has the output everywhere.

    It shares everything else with the stage's model, which stays as it was. Each stage caches its own
    layers, in the cache that it is given. No graph is kept of the output. ``begin`` and ``end``: called
    before and after each forward. ``form``: what it shares everything else with instead, see :func:`form_of`.
    """
    inner: Any = unwrapped(pipeline) if form is None else form
    whole = copy.copy(inner)

    @functools.wraps(inner.forward)
    def forward(*args: Any, **named: Any) -> Any:
        arguments = {**inspect.signature(inner.forward).bind_partial(*args).arguments, **named}
        arguments.pop("return_dict", None)
        for name in OF_ALL_LAYERS & arguments.keys():
            if arguments[name]:
                raise InputError(f"No pipeline stage has what {name} asks for: capture the layers instead.")
        cache = cache_in(arguments)
        if cache is None:
            arguments |= forward_options(inner)
        if form is not None:
            arguments = {n: value for n, value in arguments.items() if not _is_spare(pipeline, n, value)}
        begin(arguments)
        output = _output(pipeline, arguments)
        end()
        if cache is not None:
            _count_for_others(cache)
        output = _with_cache(output, cache)
        return _logits_alone(output) if form is not None and isinstance(output, torch.Tensor) else output

    vars(whole)["forward"] = forward
    return whole


def _output(pipeline: Pipeline, arguments: Mapping[str, Any]) -> Any:
    """A forward over all stages; what hooks saved in it is there afterwards on all of them."""

    def make() -> list[torch.Tensor]:
        output = pipeline(**arguments)
        if not pipeline.stage.is_last:
            return []
        attached: list[torch.Tensor] = []
        plain = detached({"": _with_cache(output, None)})[""]
        message = with_output(plain, pipeline.context or {}, attached, beside_it=MOST_TENSORS - 1)
        return [*attached, message.to(pipeline.stage.device)]

    output, saved = of_output(from_the_last(pipeline, make))
    if pipeline.context is not None:
        pipeline.context.update(saved)
    return output


def _with_cache(output: Any, cache: Any) -> Any:
    """An output with this stage's cache instead of another's, and its logits as ``generate`` reads them."""
    found = dict(leaves(output))
    if LOGITS in found and not hasattr(output, "logits"):
        return _logits_alone(found[LOGITS], cache)
    name = name_in(output)
    if name is None or getattr(output, name) is cache:
        return output
    changed = copy.copy(output)
    changed[name] = cache  # an output of transformers is a mapping too
    return changed


def _logits_alone(logits: torch.Tensor, cache: Any = None) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return _with_cache(CausalLMOutputWithPast(logits=logits), cache)


def form_of(unsharded: Callable[[], nn.Module] | None) -> nn.Module | None:
    """The unsharded model without data, if it is one that generates: for stages that do not say how to."""
    if unsharded is None:
        return None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            made = unsharded()
    except Exception:  # noqa: BLE001 - a user's own code, which may need data
        return None
    settings: Any = getattr(made, "generation_config", None)
    if settings is None or not callable(getattr(made, "generate", None)):
        return None
    settings.use_cache = False  # such stages take none
    return made


def _is_spare(pipeline: Pipeline, name: str, value: Any) -> bool:
    """Whether the first stage does not take an argument, and does the same without it."""
    taken = inspect.signature(unwrapped(pipeline).forward).parameters
    if not pipeline.stage.is_first or name in taken or any(p.kind == p.VAR_KEYWORD for p in taken.values()):
        return False
    if name == "attention_mask" and value is not None:
        return bool(value.all())
    if name == "position_ids" and value is not None:
        return torch.equal(value, torch.arange(value.shape[-1], device=value.device).expand_as(value))
    return not isinstance(value, torch.Tensor) and not value


def _count_for_others(cache: Any) -> None:
    """Let the layers that other stages cache count tokens as well, of which they keep nothing here.

    Models ask any layer how many tokens there are.
    """
    known = [layer for layer in cache.layers if hasattr(layer, "get_seq_length")]
    length = max((int(layer.get_seq_length()) for layer in known), default=0)
    own = next((layer for layer in known if length and layer.get_seq_length() == length), None)
    if own is None:
        return
    for number, layer in enumerate(cache.layers):
        missing = length - int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0
        if missing:
            nothing = own.keys.new_zeros(own.keys.shape[0], 1, missing, 1)
            cache.update(nothing, nothing, number)
