"""Surveying gradients: one tiny forward and backward, and the derivative measured where it is in doubt.

A model's own backward is trusted only as far as it is the derivative of its forward. That is
measured by central differences: along the gradient itself the loss must change by its norm. A
model whose collectives pass no gradients, or pass them several times, is refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from flexmagic.engine.distributed import Loaded
from flexmagic.engine.exchange import Exchange, RunStopped
from flexmagic.engine.groups import Groups
from flexmagic.engine.private import come_to_rest
from flexmagic.engine.probe import note
from flexmagic.engine.surveying import everyone
from flexmagic.engine.tensors import leaves, like_original, local_of, replace_leaf
from flexmagic.engine.tree import modules_of, parameters_of
from flexmagic.engine.trial import Differentiable, Trial
from flexmagic.errors import ModelError
from flexmagic.layout.assemble import assemble, own_part, split
from flexmagic.layout.gradients import DIFFERENT, gradient_rule
from flexmagic.layout.layout import Layout
from flexmagic.layout.parameter_gradients import parameter_gradient_rule, without_tied
from flexmagic.layout.rule import Extent, Rule
from flexmagic.layout.seen import Seen
from flexmagic.layout.sites import Site

STEP = 2e-3
"""Length of the step of a central difference, relative to the norm of what is changed."""
CLOSE = 0.01
"""Largest difference between a derivative and its measurement, relative to the gradient's norm."""
MOST_MEASURED = 64
COARSE = ("bfloat16", "float16")
"""Dtypes that are too coarse for a difference of two losses."""


@dataclass(frozen=True)
class Gradients:
    """The survey's result: rules, and the parameters whose gradients the model itself leaves too small.

    A gradient of those is to be multiplied by ``scale`` to be the derivative.
    """

    rules: dict[Site, Rule]
    reduced: frozenset[Site]
    scale: float


def observe_backward(model: nn.Module, loss: Callable[[], torch.Tensor | Differentiable], look: Look) -> None:
    """Make one forward and backward and show the gradient at every site to ``look``."""
    handles = []

    def watch(path: str, port: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, *rest: Any) -> Any:
            if port == "grad_output":
                watch_leaves(rest[-1], path, port, look)
                return None
            return tuple(watched(value, path, port, look) for value in (args, rest[0]))

        return hook

    try:
        for path, module in modules_of(model).items():
            handles.append(module.register_forward_pre_hook(watch(path, "grad_input"), with_kwargs=True))
            handles.append(module.register_forward_hook(watch(path, "grad_output")))
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            loss().backward()
    finally:
        for handle in handles:
            handle.remove()


Look = Callable[[Site, torch.Tensor], torch.Tensor | None]
"""What is shown a gradient, and may return another in its place."""


def watch_leaves(value: Any, path: str, port: str, look: Look) -> None:
    """Have the gradient of every tensor of a nested value shown once it is known."""
    for where, tensor in leaves(value):
        if tensor.requires_grad:
            site = Site(path, port, where)
            tensor.register_hook(lambda grad, site=site: look(site, grad))


def watched(value: Any, path: str, port: str, look: Look) -> Any:
    """Inputs of which each tensor is a view of its own, so that its gradient is this module's alone."""
    for where, tensor in list(leaves(value)):
        if tensor.requires_grad:
            view, site = tensor.view_as(tensor), Site(path, port, where)
            view.register_hook(lambda grad, site=site: look(site, grad))
            value = replace_leaf(value, where, view)
    return value


def survey_gradients(
    loaded: Loaded,
    groups: Groups,
    rules: Mapping[Site, Rule],
    row_groups: tuple[int, ...],
    arguments: dict[str, Any],
    *,
    whole: Mapping[str, tuple[int, ...]],
    mates: frozenset[int] | None = None,
) -> Gradients:
    """Rules for the gradients at all sites and of all parameters.

    ``arguments``: this rank's own rows. ``whole``: the shapes of parameters as far as there is an
    unsharded form of the model. ``mates``: the ranks of this pipeline stage, of a pipeline. Raises
    :class:`ModelError` if the model's backward is not the derivative of its forward.
    """
    _refuse_flat(loaded.model)
    exchange = Exchange(groups.own, groups.place.rank, Extent(shared_out=len(set(row_groups)) > 1), mates)
    trial = Trial(loaded, rules, exchange, arguments, len(set(row_groups)))
    local: dict[Site, torch.Tensor] = {}
    error = stopped = ""
    with own_gradients(loaded.model) as taken:
        try:
            observe_backward(
                loaded.model,
                trial.outcome,
                lambda site, grad: local.__setitem__(site, local_of(grad).detach()),
            )
        except RunStopped as stop:
            stopped = stop.reason or "another rank failed"
        except Exception as problem:  # noqa: BLE001 - all ranks must hear of it
            error = f"{type(problem).__name__}: {problem}"
        gradients = taken()
    seen = {site: note(grad, grad) for site, grad in local.items()}
    seen |= {Site(name, "grad"): note(local_of(grad), grad) for name, grad in gradients.items()}
    parts = everyone(groups, (seen, error, stopped))
    failed = [(rank, part[1]) for rank, part in enumerate(parts) if part[1]]
    failed += [(rank, part[2]) for rank, part in enumerate(parts) if part[2]]  # a consequence, as a rule
    if failed:
        msg = f"The model's own backward failed on rank {failed[0][0]}: {failed[0][1]}"
        raise ModelError(msg)
    everything = [part[0] for part in parts]
    found = _measured(_rules(everything, rules, row_groups), local, trial, groups)
    names = dict.fromkeys(site for of_rank in everything for site in of_rank if site.port == "grad")
    stages = everyone(groups, -1 if mates is None else min(mates))
    parameters = {
        s: parameter_gradient_rule(s, loaded.mesh, everything, row_groups, whole.get(s.path), stages)
        for s in names
    }
    if mates is not None and whole:
        parameters = without_tied(parameters, whole)
    reduced = {site: its.rule for site, its in parameters.items() if its.reduced}
    by_ranks: dict[tuple[int, ...], dict[Site, Rule]] = {}  # pipeline stages reduce each their own
    for site, rule in reduced.items():
        by_ranks.setdefault(rule.ranks, {})[site] = rule
    scales = {_scale(some, gradients, trial, groups) for some in by_ranks.values()} or {1.0}
    if len(scales) > 1:
        raise ModelError(f"The model's parts reduce gradients in different ways: by {sorted(scales)}.")
    found |= {site: its.rule for site, its in parameters.items()}
    return Gradients(found, frozenset(reduced), scales.pop())


def _refuse_flat(model: nn.Module) -> None:
    """Refuse FSDP1, which keeps the gradients of a unit's parameters as one flat piece per rank."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        msg = (
            "Gradients of a model in FullyShardedDataParallel (FSDP1) cannot be taken apart again. "
            "Shard it with fully_shard (FSDP2) to differentiate."
        )
        raise ModelError(msg)


def _scale(
    reduced: Mapping[Site, Rule], gradients: Mapping[str, torch.Tensor], trial: Trial, groups: Groups
) -> float:
    """How many times smaller than the derivative the model's own reduction leaves a gradient.

    Data parallelism usually averages over the ranks. Measured on one parameter, along its gradient.
    Raises :class:`ModelError` if it is neither the sum nor the average.
    """
    # the smallest parameter: all of it takes part in the forward, as not all rows of an embedding do
    site, rule = min(reduced.items(), key=lambda item: math.prod(dim.size or 1 for dim in item[1].dims))
    gradient = local_of(gradients[site.path]).detach() if site.path in gradients else None
    parts = everyone(groups, None if gradient is None else gradient.cpu())
    layout = rule.local_layout([None if part is None else tuple(part.shape) for part in parts])
    pieces = {rank: part for rank, part in enumerate(parts) if part is not None}
    norm = float(assemble(layout, pieces).double().norm()) or 1.0
    mine = None if gradient is None else local_of(parameters_of(trial.loaded.model)[site.path]).detach()
    length = STEP * (max(everyone(groups, 0.0 if mine is None else float(mine.double().norm()))) or 1.0)
    losses = []
    for sign in (1, -1):
        before = None if mine is None else mine.clone()
        if mine is not None and gradient is not None:
            mine.add_(sign * length / norm * gradient)
        losses.append(_changed(trial, site, None))
        if mine is not None and before is not None:
            mine.copy_(before)
    ratio = (losses[0] - losses[1]) / (2 * length) / norm
    for scale in (1.0, float(trial.groups)):
        if abs(ratio / scale - 1) < CLOSE:
            return scale
    msg = (
        f"The model's own reduction over ranks with different rows leaves the gradient of {site.path} "
        f"{ratio:.3g} times too small: neither their sum nor their average."
    )
    raise ModelError(msg)


def _rules(
    seen: list[dict[Site, Seen]], rules: Mapping[Site, Rule], row_groups: tuple[int, ...]
) -> dict[Site, Rule]:
    order = list(dict.fromkeys(site for of_rank in seen for site in of_rank))
    out = {}
    for site in order:
        if site.port == "grad":
            continue
        forward = rules.get(_forward_of(site))
        if forward is not None:
            out[site] = gradient_rule(site, forward, seen, row_groups)
    return out


def _measured(
    found: dict[Site, Rule], local: Mapping[Site, torch.Tensor], trial: Trial, groups: Groups
) -> dict[Site, Rule]:
    """Hold gradients against measured derivatives: one for the model, and each that is in doubt.

    If one that is in doubt is wrong, the model's collectives do not pass gradients as one process
    would, and none of those is given.
    """
    sure = [
        s for s, rule in found.items() if not rule.refused and not rule.addends and s.port == "grad_output"
    ]
    for site in {found[s].ranks: s for s in sure}.values():  # one on each pipeline stage
        norm, off = _deviation(found[site], local, trial, groups)
        if off > CLOSE * norm and found[site].dtype in COARSE:
            msg = (
                f"Gradients are held against measured derivatives, which the rounding of {found[site].dtype} "
                'hides: load the model with dtype="float32" to differentiate.'
            )
            raise ModelError(msg)
        if off > CLOSE * norm:
            msg = (
                "The model's own backward is not the derivative of its forward: along the gradient at "
                f"{site}, of norm {norm:.4g}, the loss changes by {off:.4g} more or less than that. "
                "Its collectives do not pass gradients as one process would."
            )
            raise ModelError(msg)
    doubtful = [site for site, rule in found.items() if not rule.refused and rule.addends]
    wrong = len(doubtful) > MOST_MEASURED
    for site in doubtful[:MOST_MEASURED]:
        norm, off = _deviation(found[site], local, trial, groups)
        wrong = wrong or off > CLOSE * norm
    return found | {s: replace(found[s], refused=DIFFERENT) for s in doubtful if wrong}


def _deviation(
    rule: Rule, local: Mapping[Site, torch.Tensor], trial: Trial, groups: Groups
) -> tuple[float, float]:
    """The norm of a gradient, and by how much the loss changes otherwise than it says.

    Measured along the gradient itself and along what the first and the last rank hold of it.
    """
    rank = groups.place.rank
    mine = local.get(rule.site)
    parts = everyone(groups, None if mine is None or rank not in rule.ranks else mine.cpu())
    shapes = [None if part is None else tuple(part.shape) for part in parts]
    layout = rule.local_layout(shapes, trial.exchange.extent)
    pieces = {r: part.double() for r, part in enumerate(parts) if part is not None}
    gradient = assemble(layout, pieces)
    along = trial.rules[_forward_of(rule.site)].local_layout(shapes, trial.exchange.extent)
    directions = [gradient]
    if rule.addends:
        for one in (min(pieces), max(pieces)):
            directions.append(gradient.new_zeros(gradient.shape))
            for there, here in own_part(layout, one):
                directions[-1][there] = pieces[one][here]
    offs = [_off(gradient, v / v.norm(), along, rule.site, trial, groups) for v in directions if v.norm() > 0]
    return float(gradient.norm()), max(offs, default=0.0)


def _forward_of(site: Site) -> Site:
    """The site that a gradient is the gradient of."""
    return Site(site.path, site.port.removeprefix("grad_"), site.leaf)


def _off(  # noqa: PLR0917 - one measurement and where it is made
    gradient: torch.Tensor, direction: torch.Tensor, along: Layout, site: Site, trial: Trial, groups: Groups
) -> float:
    """How far the derivative along a unit direction is from what a gradient says of it."""
    own = split(along, groups.place.rank, direction)
    size = _norm(trial, site, own, groups)
    up, down = (_loss_at(trial, site, own, sign * STEP * size) for sign in (1, -1))
    return abs(float((gradient * direction).sum()) - (up - down) / (2 * STEP * size))


def _norm(trial: Trial, site: Site, direction: torch.Tensor | None, groups: Groups) -> float:
    """The norm of a site's value, the largest over the ranks; the same number on all of them."""
    found = [0.0]

    def look(value: torch.Tensor) -> torch.Tensor:
        found.append(float(value.detach().double().norm()))
        return value

    _changed(trial, site, look if direction is not None else None)
    return max(everyone(groups, found[-1])) or 1.0


def _loss_at(trial: Trial, site: Site, direction: torch.Tensor | None, length: float) -> float:
    """The loss with a site's value moved along a direction, each rank moving its own piece."""

    def move(value: torch.Tensor) -> torch.Tensor:
        assert direction is not None  # asked only where this rank holds the site
        return value + (length * direction).to(value)

    return _changed(trial, site, move if direction is not None else None)


def _changed(trial: Trial, site: Site, change: Callable[[torch.Tensor], torch.Tensor] | None) -> float:
    """The loss of a forward in which a site's local value is changed, where this rank holds it."""
    handle = None
    if change is not None:
        module = modules_of(trial.loaded.model)[site.path]

        def apply(value: Any) -> Any:
            found = dict(leaves(value)).get(site.leaf)
            return (
                value
                if found is None
                else replace_leaf(value, site.leaf, like_original(change(local_of(found)), found))
            )

        if site.port == "grad_output":
            handle = module.register_forward_hook(lambda _m, _a, output: apply(output))
        else:
            handle = module.register_forward_pre_hook(
                lambda _m, args, kwargs: (apply(args), apply(kwargs)), with_kwargs=True
            )
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return float(trial.loss().double())
    finally:
        if handle is not None:
            handle.remove()
        come_to_rest(trial.loaded.model)  # without a backward, fully_shard leaves its outermost unit whole


@contextlib.contextmanager
def own_gradients(model: nn.Module) -> Iterator[Callable[[], dict[str, torch.Tensor]]]:
    """Start without parameter gradients and put back those that were there; yields how to read the new ones.

    Plain data parallelism does not reduce them meanwhile: each rank keeps those of its own rows.
    """
    before = {name: parameter.grad for name, parameter in parameters_of(model).items()}
    for parameter in parameters_of(model).values():
        parameter.grad = None
    alone = model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
    try:
        with alone:
            yield lambda: {n: p.grad for n, p in parameters_of(model).items() if p.grad is not None}
    finally:
        for name, parameter in parameters_of(model).items():
            parameter.grad = before.get(name)
