"""A model's own ``generate`` over pipeline stages: it runs on every rank, its forwards over all stages."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from flexmagic.engine.loss import LOGITS
from flexmagic.engine.messages import packed, unpacked
from flexmagic.engine.pipeline import Pipeline
from flexmagic.engine.stage_output import from_the_last
from flexmagic.engine.tensors import leaves
from flexmagic.engine.tree import unwrapped
from flexmagic.errors import ModelError


def whole_of(pipeline: Pipeline) -> Any:
    """The stage's model as the whole one: its forward is that of all stages, and has the logits everywhere.

    It shares everything else with the stage's model, which stays as it was. What a stage caches are
    its own layers.
    """
    inner: Any = unwrapped(pipeline)
    whole = copy.copy(inner)

    @functools.wraps(inner.forward)
    def forward(**arguments: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        arguments.pop("return_dict", None)
        *found, saved = from_the_last(pipeline, lambda: _logits(pipeline(**arguments), pipeline))
        if pipeline.context is not None:  # the next step's hooks read what this one's saved
            pipeline.context.update(unpacked([saved])[0])
        logits = found[0]
        cache = arguments.get("past_key_values")
        if cache is not None:
            _count_for_others(cache)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    vars(whole)["forward"] = forward
    return whole


def _logits(output: Any, pipeline: Pipeline) -> list[torch.Tensor]:
    if output is None:  # on all stages but the last
        return []
    found = dict(leaves(output))
    if LOGITS not in found:
        raise ModelError("The last pipeline stage returns no logits, so no token can be chosen.")
    return [found[LOGITS], packed(pipeline.context or {}).to(found[LOGITS].device)]


def _count_for_others(cache: Any) -> None:
    """Let the layers that other stages cache count tokens as well, of which they keep nothing here.

    Models ask any layer how many tokens there are.
    """
    known = [layer for layer in cache.layers if hasattr(layer, "get_seq_length")]
    length = max((layer.get_seq_length() for layer in known), default=0)
    own = next((layer for layer in known if length and layer.get_seq_length() == length), None)
    if own is None:
        return
    for number, layer in enumerate(cache.layers):
        missing = length - layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
        if missing:
            nothing = own.keys.new_zeros(own.keys.shape[0], 1, missing, 1)
            cache.update(nothing, nothing, number)
