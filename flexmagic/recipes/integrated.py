"""Integrated gradients: a metric's difference from a baseline, shared out over the prompt's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import place
from flexmagic.recipes.prompts import loss_of, number, one_prompt, tokens_of, two_prompts

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.session import Session

ROWS = 16
"""Points of the path in one run."""
ENDS = """\
x = model[site]
if zero:
    x[1] = 0
whole = model.output.logits
logits = whole[0]
save.metric = {metric}
logits = whole[1]
save.baseline = {metric}
"""
ALONG = """\
import torch
x = model[site]
old = x.detach()
other = torch.zeros_like(old[-1]) if zero else old[-1]
parts = torch.as_tensor(parts).to(old)[:, None, None]
x[:-1] += (parts - 1) * (old[:-1] - other)
"""
"""The last row is the baseline; each other one goes so far of the way from it to the prompt."""


@dataclass(frozen=True, eq=False)
class Integrated:
    """What each token's embedding adds to the metric, on the way from the baseline to the prompt.

    ``value``: ``[position]``; its sum is ``metric - baseline`` (completeness), but for ``gap``, which more
    steps make smaller.
    """

    value: Named
    metric: float
    baseline: float
    steps: int

    @property
    def gap(self) -> float:
        """How far the sum is from the difference of the metrics, relative to the sum of all sizes."""
        size = float(np.abs(self.value.values).sum())
        off = abs(float(self.value.values.sum()) - (self.metric - self.baseline))
        return off / size if size else float(off > 0)

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each position: what a data frame takes."""
        return self.value.rows()

    def strip(self) -> Shown:
        """The prompt with the values as colours."""
        from flexmagic import strip

        return strip(self.value.values, self.value.labels["position"][1], title="integrated gradients")

    def _ipython_display_(self) -> None:
        self.strip()._ipython_display_()

    def __repr__(self) -> str:
        """Both metrics, and how far the values are from summing up to their difference."""
        return (
            f"<Integrated gradients: {self.baseline:.4g} to {self.metric:.4g} in {self.steps} steps, "
            f"gap {self.gap:.2%}>"
        )


def integrated_gradients(
    session: Session,
    prompt: Any,
    metric: str,
    *,
    baseline: Any = None,
    tokens: Mapping[str, str | int] | None = None,
    steps: int = 32,
    progress: Any = None,
) -> Integrated:
    """Share out the metric's change from a baseline over the tokens, along a straight path of embeddings.

    ``prompt``: a text or a list of ids. ``baseline``: a prompt of equally many tokens, or ``None`` for
    embeddings of zero; a model with a normalisation right behind them is not smooth there, and needs many
    steps, or a prompt. ``metric``, ``tokens``: as in :func:`patching`; the metric has to be differentiable.
    Nor is one smooth that sends tokens to experts: of what changes at once the gradients know nothing, which
    ``gap`` shows. ``steps``: points of the path, by the rule of Gauss and Legendre. A place's value is its
    embedding's difference from the baseline's times the mean gradient there, summed over features. Enabled
    hooks act.

    Raises :class:`InputError`, and :class:`ModelError` for a model whose gradients are not those of one
    process. Source: Sundararajan et al. 2017, "Axiomatic attribution for deep networks" (arXiv 1703.01365).
    """
    if steps < 1:
        raise InputError(f"The path needs 1 step or more, not {steps}.")
    if baseline is None:
        ids, texts = one_prompt(session, prompt)
        pair = [ids, ids]
    else:
        pair, texts = two_prompts(session, prompt, baseline, ("Prompt", "Baseline"))
    named = tokens_of(session, metric, tokens)
    site = str(place(session.model, "embed")[0])
    grad = str(place(session.model, "embed:grad_output")[0])
    given = {"site": site, "zero": baseline is None}
    ends = session.trace(pair, ENDS.format(metric=metric), given={**named, **given}, progress=progress)
    values = [number(ends.context[name], metric) for name in ("metric", "baseline")]
    ends.release()
    points, weights = np.polynomial.legendre.leggauss(steps)
    at, weights = (points + 1) / 2, weights / 2
    mean: Any = 0.0
    difference: Any = None
    for first in range(0, steps, ROWS):
        parts = at[first : first + ROWS].tolist()
        loss = f"sum({loss_of(metric, named, 'at')} for at in range({len(parts)}))"
        run = session.trace(
            [pair[0]] * len(parts) + [pair[1]], ALONG, given={**given, "parts": parts},
            backward=loss, capture=grad, progress=progress,
        )  # fmt: skip
        found = run[grad].numpy().astype(np.float64)[:-1]
        mean = mean + np.einsum("n,nsd->sd", weights[first : first + ROWS], found)
        run.release()
    plain = session.run(pair, capture=site, progress=progress)
    x = plain[site].numpy().astype(np.float64)
    plain.release()
    difference = x[0] - (0.0 if baseline is None else x[1])
    value = Named(
        (difference * mean).sum(-1), ("position",), "attribution", {"position": ("token", tuple(texts))}
    )
    return Integrated(value, values[0], values[1], steps)
