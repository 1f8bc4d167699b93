"""Ablations: what the model loses without one head, one neuron or one part of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError, SiteError
from flexmagic.recipes.aside import batches, encoded
from flexmagic.recipes.effects import Effects
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import depth, place, token_of

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.model import Model
    from flexmagic.client.session import Session
    from flexmagic.layout.sites import Site

PARTS = ("attn_out", "mlp_out")
HEADS = ("attn.z", "attn.q", "attn.k", "attn.v")
NEURONS = "mlp.neurons"
HOW = ("zero", "mean", "resample")
Target = tuple[str, tuple[int, int] | None]
"""A site of the model, and the columns that are ablated in it; all of them for ``None``."""
LOSS = (
    "-logits[:, :-1].float().log_softmax(-1)"
    ".gather(-1, torch.tensor(ids, device=logits.device)[:, 1:, None]).mean()"
)
"""The mean loss, in nats, of predicting each token of the texts from those before it."""
MEASURE = """\
import torch
logits = model.output.logits[:count]
save.value = {metric}
"""
PUT = {
    "zero": "new = 0",
    "mean": "new = torch.as_tensor(means[site][start:stop]).to(x)",
    "resample": "new = x[picked, ..., start:stop].clone()",
}
ABLATE = """\
import torch
site, columns = target
x = model[site]
start, stop = columns or (0, x.shape[-1])
{put}
x[:count, ..., start:stop] = new
"""
SUMS = """\
for at, site in enumerate(sites):
    setattr(save, f"sum{at}", model[site].double().flatten(0, -2).sum(0))
"""


@dataclass(frozen=True, eq=False)
class Ablation(Effects):
    """What a metric is without each part of the model: ``effect`` is that minus the whole model's.

    ``effect`` and ``metric``: ``[layer, head]``, ``[layer, neuron]`` or ``[layer]``. ``whole``: the metric
    of the whole model. ``how``: what took the part's place.
    """

    whole: float
    how: str
    site: str

    def grid(self) -> Shown:
        """Layers by heads or neurons; layers as rows where there are neither."""
        shown = self.effect
        if len(shown.dims) == 1:
            shown = replace(shown, values=shown.values[:, None], dims=(*shown.dims, self.site))
        return shown.grid(f"{self.how} ablation of {self.site}: change of the metric")

    def __repr__(self) -> str:
        """How it was done, and where the effect was largest."""
        most = self.largest(1)[0]
        where = ", ".join(f"{dim} {most[dim]}" for dim in self.effect.dims)
        return (
            f"<Ablation {self.site}, {self.how}: metric {self.whole:.4g}; "
            f"largest change {most['effect']:+.4g} without {where}>"
        )


def ablation(
    session: Session,
    texts: Sequence[Any] | str,
    metric: str = "loss",
    *,
    site: str = "attn.z",
    how: str = "zero",
    reference: Sequence[Any] | None = None,
    tokens: Mapping[str, str | int] | None = None,
    layers: Sequence[int] | None = None,
    units: Sequence[int] | None = None,
    seed: int = 0,
    progress: Any = None,
) -> Ablation:
    """Measure the model without each head, each neuron, or each layer's attention or MLP.

    ``texts``: one, or several of equally many tokens. ``metric``: ``"loss"``, the mean of predicting their
    tokens, in nats, or an expression over ``logits`` ``[batch, seq, vocab]``, ``ids`` and the names of
    ``tokens``. ``site``: ``attn.z``, ``attn.q``, ``attn.k`` or ``attn.v``, head by head; ``mlp.neurons``,
    those between the two halves of the MLP, one by one; or ``attn_out`` or ``mlp_out`` as a whole.
    ``layers`` and ``units`` restrict which.

    ``how``: ``"zero"``; ``"mean"``, over all tokens of ``reference``; ``"resample"``, for each text the
    values of one of ``reference``, drawn under ``seed``, position by position, so that these have as many
    tokens. Without ``reference`` the texts themselves are taken, each answering for the one before it.
    Enabled hooks act.

    Raises :class:`InputError`, or :class:`SiteError` where there is no such place, as in a mixture of experts
    no one layer of neurons. Source: Michel et al. 2019 (arXiv 1905.10650), Wang et al. 2022
    (2211.00593), Chan et al. 2022, "Causal scrubbing" (resampling).
    """
    if how not in HOW:
        raise InputError(f"{how!r} is no way to ablate: choose one of {', '.join(HOW)}.")
    expression = LOSS if metric == "loss" else _checked(metric)
    ids = encoded(session, [texts] if isinstance(texts, str) else texts)
    other = ids if reference is None else encoded(session, reference)
    if len({len(row) for row in (*ids, *(other if how == "resample" else []))}) > 1:
        raise InputError("The texts have different numbers of tokens, and are rows of one batch.")
    model = session.model
    layers = list(range(depth(model))) if layers is None else list(layers)
    targets, shape, unit = _targets(model, site, layers, units)
    given: dict[str, Any] = {n: token_of(session, token) for n, token in (tokens or {}).items()}
    given |= {"count": len(ids), "ids": ids}
    rows = ids
    if how == "mean":
        given["means"] = _means(session, other, {name for name, _ in targets}, progress)
    elif how == "resample":
        rows, given["picked"] = ids + other, _picked(len(ids), len(other), seed, own=reference is None)
    measure = MEASURE.format(metric=expression)
    whole = session.trace(rows, measure, given=given, progress=progress)
    before = _number(whole.context["value"], metric)
    whole.release()
    code = ABLATE.format(put=PUT[how]) + measure
    sweep = session.sweep(rows, code, {"target": targets}, given=given, progress=progress)
    values = np.array([_number(value, metric) for value in sweep["value"]]).reshape(shape)
    for run in sweep.runs:
        run.release()
    numbers = {"layer": tuple(layers)} | ({} if units is None else {unit: tuple(units)})
    shown = Named(values, ("layer", unit) if unit else ("layer",), "metric", numbers=numbers)
    return Ablation(replace(shown, values=values - before, name="effect"), shown, before, how, site)


def neurons(model: Model, layer: int) -> tuple[Site, int]:
    """Where the neurons of a layer's MLP go into its second half, and how many there are.

    Raises :class:`SiteError` for an MLP that has no such one place.
    """
    path = place(model, f"blocks.{layer}.mlp")[0].path
    width = model.rules[place(model, f"blocks.{layer}.resid_pre")[0]].dims[-1].size
    found = []
    for site, rule in model.rules.items():
        out = [r for s, r in model.rules.items() if (s.path, s.port) == (site.path, "output")]
        if not site.path.startswith(f"{path}.") or site.port != "input" or rule.refused or len(out) != 1:
            continue
        size = rule.dims[-1].size
        if [d.name for d in rule.dims[:-1]] == ["batch", "seq"] and out[0].dims[-1].size == width != size:
            found.append((site, size))
    if len(found) != 1 or found[0][1] is None:
        raise SiteError(
            f"The MLP of layer {layer} has {len(found)} modules that turn neurons into the residual stream, "
            "and one is needed. A mixture of experts has none: each token has neurons of its own there."
        )
    return found[0][0], found[0][1]


def _targets(
    model: Model, site: str, layers: Sequence[int], units: Sequence[int] | None
) -> tuple[list[Target], tuple[int, ...], str]:
    """What is ablated one after the other, its shape, and what is counted in a layer."""
    if site in PARTS:
        if units is not None:
            raise InputError(f"{site} is ablated as a whole: leave units away.")
        return [(str(place(model, f"blocks.{n}.{site}")[0]), None) for n in layers], (len(layers),), ""
    if site not in (*HEADS, NEURONS):
        raise InputError(f"{site!r} cannot be ablated: choose one of {', '.join((*HEADS, NEURONS, *PARTS))}.")
    out: list[Target] = []
    counts = set()
    for layer in layers:
        if site == NEURONS:
            own, size = neurons(model, layer)
            columns = [(at, at + 1) for at in range(size)]
        else:
            own, heads = place(model, f"blocks.{layer}.{site}")
            assert heads is not None  # these sites have some
            columns = [(start, start + heads.width) for start in heads.starts]
        wanted = range(len(columns)) if units is None else units
        if any(not 0 <= unit < len(columns) for unit in wanted):
            raise InputError(
                f"Layer {layer} has {len(columns)} of {site}, counted from 0, not all of {units}."
            )
        out += [(str(own), columns[unit]) for unit in wanted]
        counts.add(len(wanted))
    if len(counts) > 1:
        raise InputError("The layers differ in what they have: give layers that are alike.")
    return out, (len(layers), *counts), "neuron" if site == NEURONS else "head"


def _means(
    session: Session, ids: list[list[int]], named: set[str], progress: Any
) -> dict[str, NDArray[np.float32]]:
    """At each site the mean over all tokens of some texts, ``[width]``; only sums travel."""
    sites = [str(site) for site in session.model.rules if str(site) in named]  # as the forward reaches them
    total: dict[str, Any] = dict.fromkeys(sites, 0.0)
    for part in batches(ids, len(ids)):
        run = session.trace([ids[i] for i in part], SUMS, given={"sites": sites}, progress=progress)
        for at, site in enumerate(sites):
            total[site] = total[site] + run.context[f"sum{at}"].cpu().numpy()
        run.release()
    count = sum(map(len, ids))
    return {site: (sums / count).astype(np.float32) for site, sums in total.items()}


def _picked(count: int, others: int, seed: int, *, own: bool) -> list[int]:
    """For each text the row of the batch whose values it gets."""
    if own:
        if count < 2:
            raise InputError("One text alone has no other to be resampled from: give reference.")
        return [count + (at + 1) % count for at in range(count)]
    return [count + int(at) for at in np.random.default_rng(seed).integers(others, size=count)]


def _checked(metric: str) -> str:
    """An expression; raises :class:`InputError` for what is none."""
    try:
        compile(metric, "<metric>", "eval")
    except SyntaxError as error:
        raise InputError(f"The metric {metric!r} is no expression: {error.msg}.") from None
    return metric


def _number(value: Any, metric: str) -> float:
    """The one number that a metric is to give."""
    found = np.asarray(value.detach().cpu().float().numpy() if hasattr(value, "detach") else value)
    if found.ndim:
        raise InputError(f"{metric} gave the shape {list(found.shape)}, and a metric is one number.")
    return float(found)
