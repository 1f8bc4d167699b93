"""Attribution from gradients: what an activation is worth, and what patching it would change, estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.recipes.named import Named
from flexmagic.recipes.patching import Patching, both_ends, patching
from flexmagic.recipes.places import place
from flexmagic.recipes.prompts import loss_of, one_prompt, tokens_of, two_prompts
from flexmagic.recipes.where import Where

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic import Shown
    from flexmagic.client.session import Session


@dataclass(frozen=True, eq=False)
class Attribution:
    """What each place is worth to a metric: the sum over its features of gradient times activation.

    ``value``: ``[layer, position]``; of heads ``[layer, head]``; with groups of positions their dim ``group``
    is the last. ``metric``: of the prompt.
    """

    value: Named
    metric: float
    site: str

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each place: what a data frame takes."""
        return self.value.rows()

    def largest(self, count: int = 5) -> list[dict[str, Any]]:
        """The places of the largest values of either sign, first the largest."""
        return sorted(self.rows(), key=lambda row: -abs(row[self.value.name]))[:count]

    def grid(self, group: int = 0) -> Shown:
        """Layers by positions, or by heads, of several groups of positions for one of them."""
        value = self.value.at(group=group) if len(self.value.dims) > 2 else self.value
        return value.grid(f"gradient times activation at {self.site}")

    def _ipython_display_(self) -> None:
        self.grid()._ipython_display_()

    def __repr__(self) -> str:
        """The metric and the place that is worth most."""
        kept = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.largest(1)[0].items()
        )
        return f"<Attribution {self.site}: metric {self.metric:.4g}; {kept}>"


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Attribution patching beside the patching that it estimates, at the same places.

    ``off``: the largest difference of effects, relative to the largest measured one. ``correlation``: of
    both over all places, ``nan`` where one does not vary.
    """

    estimated: Patching
    measured: Patching

    @property
    def off(self) -> float:
        """The largest difference, relative to the largest measured effect."""
        one, other = self.estimated.effect.values, self.measured.effect.values
        return float(np.abs(one - other).max() / np.abs(other).max())

    @property
    def correlation(self) -> float:
        """Pearson's, over all places."""
        one, other = self.estimated.effect.values.ravel(), self.measured.effect.values.ravel()
        if one.size < 2 or not one.std() or not other.std():
            return float("nan")
        return float(np.corrcoef(one, other)[0, 1])

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each place with both effects: what a data frame takes."""
        pairs = zip(self.estimated.effect.rows(), self.measured.effect.rows(), strict=True)
        return [{**a, "effect": b["effect"], "estimated": a["effect"]} for a, b in pairs]

    def grid(self) -> Shown:
        """Estimated minus measured effects."""
        one, other = self.estimated.effect, self.measured.effect
        off = replace(one, values=one.values - other.values, name="difference")
        return off.grid(f"attribution patching minus patching, {self.estimated.site}")

    def __repr__(self) -> str:
        """How close they are."""
        return f"<Faithfulness {self.estimated.site}: {self.off:.1%} off, correlation {self.correlation:.3f}>"


def gradient_times_activation(
    session: Session,
    prompt: Any,
    metric: str,
    *,
    site: str = "resid_pre",
    tokens: Mapping[str, str | int] | None = None,
    layers: Sequence[int] | None = None,
    positions: Mapping[str, Sequence[int]] | None = None,
    progress: Any = None,
) -> Attribution:
    """The metric's gradient at each place times what is there, summed over features: one run with a loss.

    It is what the metric would lose, to first order, if the place were zero. ``prompt``: a text or a list
    of ids. ``metric``, ``tokens``, ``site``, ``layers`` and ``positions``: as in :func:`patching`; the metric
    has to be differentiable. Activations and gradients of these sites travel. Enabled hooks act.

    Raises :class:`InputError`, :class:`SiteError` for a site that the model has not, and
    :class:`ModelError` for a model whose gradients are not those of one process. Source: Shrikumar et al.
    2017 (arXiv 1704.02685), Ancona et al. 2018 (1711.06104).
    """
    ids, texts = one_prompt(session, prompt)
    where = Where.of(session.model, site, texts, layers, positions)
    named = tokens_of(session, metric, tokens)
    value, of_prompt = _products(
        session, [ids], where, site, loss_of(metric, named), rows=(0, None), progress=progress
    )
    return Attribution(where.values(value, "attribution"), of_prompt, site)


def attribution_patching(
    session: Session,
    clean: Any,
    corrupt: Any,
    metric: str,
    *,
    site: str = "resid_pre",
    denoising: bool = True,
    tokens: Mapping[str, str | int] | None = None,
    layers: Sequence[int] | None = None,
    positions: Mapping[str, Sequence[int]] | None = None,
    progress: Any = None,
) -> Patching:
    """Estimate :func:`patching` at all places by one run with a loss, to first order.

    The change of the metric is taken as the difference of both prompts' activations times the gradient of
    the prompt that would be patched. All arguments, and the effect, are as in :func:`patching`;
    :func:`faithfulness` says how good the estimate is. Activations and gradients of these sites travel.

    Raises as :func:`gradient_times_activation`. Source: Nanda 2023, "Attribution patching: activation
    patching at industrial scale"; Syed et al. 2023 (arXiv 2310.10348).
    """
    ids, texts = two_prompts(session, clean, corrupt)
    where = Where.of(session.model, site, texts, layers, positions)
    named = tokens_of(session, metric, tokens)
    ends = both_ends(session, ids, metric, named)
    row, other = int(denoising), int(not denoising)
    change, _ = _products(
        session, ids, where, site, loss_of(metric, named, str(row)), rows=(row, other), progress=progress
    )
    start, end = ends[::-1] if denoising else ends
    effect, metrics = where.values(change / (end - start), "effect"), where.values(start + change, "metric")
    return Patching(effect, metrics, *ends, denoising, site, named, estimated=True)


def faithfulness(
    session: Session,
    clean: Any,
    corrupt: Any,
    metric: str,
    *,
    step: float = 1.0,
    memory: int | None = None,
    progress: Any = None,
    **options: Any,
) -> Faithfulness:
    """Attribution patching beside real patching of the same places.

    ``step``: as in :func:`patching`; at a small one, such as 0.01, both are the slope of the metric and
    agree, at 1 they differ by what is not linear. ``options``: of :func:`attribution_patching`, with its
    errors.
    """
    estimated = attribution_patching(session, clean, corrupt, metric, progress=progress, **options)
    measured = patching(
        session, clean, corrupt, metric, step=step, memory=memory, progress=progress, **options
    )
    return Faithfulness(estimated, measured)


def _products(
    session: Session,
    ids: list[list[int]],
    where: Where,
    site: str,
    loss: str,
    *,
    rows: tuple[int, int | None],
    progress: Any,
) -> tuple[NDArray[np.float64], float]:
    """``[target, group]``: the gradient of the first row times its activation, or its way to the other's.

    Beside it the loss.
    """
    model = session.model
    slope = "attn_out" if site == "resid_mid" else site  # see Target: that is where all of it goes through
    wanted = [(f"blocks.{n}.{site}", f"blocks.{n}.{slope}:grad_output") for n in where.layers]
    pairs = [[str(place(model, name)[0]) for name in pair] for pair in wanted]
    run = session.run(ids, backward=loss, capture=[s for pair in pairs for s in pair], progress=progress)
    each: list[NDArray[np.float64]] = []
    row, other = rows
    for own, gradient in pairs:
        x = run[own].numpy().astype(np.float64)
        each.append(run[gradient][row].astype(np.float64) * (x[row] if other is None else x[other] - x[row]))
    value = float(run.loss or 0.0)
    run.release()
    out, of_layer = [], len(where.targets) // len(where.layers)
    for at, (_, _, columns) in enumerate(where.targets):
        start, stop = columns or (0, None)
        by_position = each[at // of_layer][:, start:stop].sum(-1)
        out.append([by_position[places].sum() for places in where.groups.values()])
    return np.array(out), value
