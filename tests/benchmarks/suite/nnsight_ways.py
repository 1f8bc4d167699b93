"""The same work in NNsight: in a file of its own, as it reads the source of its traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def envoy(model: Any, path: str) -> Any:
    """A module of the wrapped model by its path."""
    found = model
    for name in path.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    return found


def retrieve(model: Any, ids: torch.Tensor, paths: Sequence[str]) -> Any:
    """One forward that saves the outputs of modules, and the logits."""
    modules = [envoy(model, path) for path in paths]
    with model.trace(ids, use_cache=False):
        kept = [].save()
        for module in modules:
            kept.append(module.output)
        logits = model.lm_head.output.save()
    return logits  # noqa: RET504 - within the trace it is not there yet


def edit(model: Any, ids: torch.Tensor, paths: Sequence[str]) -> Any:
    """One forward in which the outputs of modules are halved."""
    modules = [envoy(model, path) for path in paths]
    with model.trace(ids, use_cache=False):
        for module in modules:
            module.output = module.output * 0.5
        logits = model.lm_head.output.save()
    return logits  # noqa: RET504 - within the trace it is not there yet


def _clean(model: Any, clean: torch.Tensor) -> Any:
    with torch.no_grad(), model.trace(clean):
        kept = [].save()  # NNsight gives lists this method inside a trace
        for block in model.model.layers:
            kept.append(block.input)
    return kept


def grid(model: Any, clean: torch.Tensor, corrupt: torch.Tensor, token: int) -> torch.Tensor:
    """The residual stream of one text put into another's, one trace per layer and position."""
    kept = _clean(model, clean)
    out = torch.zeros(len(kept), clean.shape[1])
    for layer in range(len(kept)):
        for position in range(clean.shape[1]):
            with torch.no_grad(), model.trace(corrupt):
                x = model.model.layers[layer].input.clone()
                x[:, position] = kept[layer][:, position]
                model.model.layers[layer].input = x
                found = model.lm_head.output[0, -1, token].save()
            out[layer, position] = found
    return out


def grid_of_invokes(model: Any, clean: torch.Tensor, corrupt: torch.Tensor, token: int) -> torch.Tensor:
    """The same, with all positions of a layer as invokes of one trace, which is one batch."""
    kept = _clean(model, clean)
    out = torch.zeros(len(kept), clean.shape[1])
    for layer in range(len(kept)):
        with torch.no_grad(), model.trace() as tracer:
            found = [].save()
            for position in range(clean.shape[1]):
                with tracer.invoke(corrupt):
                    x = model.model.layers[layer].input.clone()
                    x[:, position] = kept[layer][:, position]
                    model.model.layers[layer].input = x
                    found.append(model.lm_head.output[0, -1, token])
        out[layer] = torch.stack(list(found))
    return out
