"""Steering: a direction, added to the residual stream while the model generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import place, token_of

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.session import Session

STEER = """\
for step in model.steps:
    x = model[site]
    x += scale * torch.as_tensor(vector).to(x)
    if step == 0:
        logits = model.output.logits[0]
        save.first = logits[-1]
        save.metric = {metric}
"""


@dataclass(frozen=True, eq=False)
class Steering:
    """What a prompt goes on with at each scale of a direction.

    ``texts``: of each scale; ``metric``: ``[scale]``, at the end of the prompt; ``logits``:
    ``[scale, vocab]``, of the first new token.
    """

    texts: tuple[str, ...]
    metric: Named
    logits: NDArray[np.float32]
    scales: tuple[float, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each scale, with the metric and the text: what a data frame takes."""
        return [
            {"scale": scale, "metric": value, "text": text}
            for scale, value, text in zip(self.scales, self.metric.values.tolist(), self.texts, strict=True)
        ]

    def lines(self) -> Shown:
        """The metric over the scale."""
        from flexmagic import lines

        return lines(
            {"metric": self.metric.values}, [f"{s:g}" for s in self.scales], title="steering", over="scale"
        )

    def __repr__(self) -> str:
        """A line for each scale."""
        return "\n".join(f"{row['scale']:+g}  {row['metric']:8.3f}  {row['text']!r}" for row in self.rows())


def steering_vector(
    session: Session, positive: Sequence[str], negative: Sequence[str], site: str = "blocks.0.resid_post"
) -> NDArray[np.float32]:
    """The direction ``[d_model]`` from texts of one kind to texts of another, at their last token.

    It is the mean of ``positive`` minus the mean of ``negative`` at ``site``; only those values travel.
    Raises :class:`InputError` without a text of each kind. Source: Turner et al. 2023 (arXiv 2308.10248),
    Rimsky et al. 2023 (2312.06681).
    """
    if not positive or not negative or isinstance(positive, str) or isinstance(negative, str):
        raise InputError("A direction goes from texts of one kind to texts of another: give a list of each.")
    means = []
    for texts in (positive, negative):
        found = []
        for text in texts:
            run = session.run(text, capture=[site])
            found.append(np.asarray(run[site][0, -1], dtype=np.float64))
            run.release()
        means.append(np.mean(found, axis=0))
    difference: NDArray[np.float32] = (means[0] - means[1]).astype(np.float32)
    return difference


def steering(
    session: Session,
    prompt: str,
    vector: Any,
    *,
    site: str = "blocks.0.resid_post",
    scales: Sequence[float] = (-1.0, 0.0, 1.0),
    metric: str = "logits[-1].max()",
    tokens: Mapping[str, str | int] | None = None,
    max_new_tokens: int = 12,
    progress: Any = None,
) -> Steering:
    """Generate once for each scale, with ``scale · vector`` added at ``site``, at every token.

    ``vector``: ``[d_model]``, as from :func:`steering_vector`. ``metric``: an expression over ``logits``,
    those of the prompt ``[seq, vocab]``, and the names of ``tokens``, as in :func:`patching`. With scale 0
    the model does what it does without. Enabled hooks act.

    Raises :class:`InputError`, :class:`SiteError` for a site that the model has not, or :class:`ModelError`
    over pipeline stages, through which a trace does not generate.
    """
    if not len(scales):
        raise InputError("Give a scale or more, such as scales=(0, 1, 2).")
    own, heads = place(session.model, site)
    if heads is not None:
        raise InputError(
            f"{site} has heads; steer where the residual stream is, such as blocks.0.resid_post."
        )
    if site.endswith("resid_mid"):
        raise InputError(f"At {site} only the MLP would see the direction; the same at attn_out is for all.")
    named = {name: token_of(session, token) for name, token in (tokens or {}).items()}
    given = {**named, "site": str(own), "vector": np.asarray(vector, dtype=np.float32)}
    code = f"import torch\n{STEER.format(metric=metric)}"
    texts, metrics, logits = [], [], []
    for scale in scales:
        run: Any = session.trace(
            prompt,
            code,
            given={**given, "scale": float(scale)},
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        texts.append(run.text[0] if run.text else "")
        metrics.append(float(run.context["metric"]))
        logits.append(run.context["first"].float().cpu().numpy())
        run.release()
    labels = {"scale": ("times", tuple(f"{s:g}" for s in scales))}
    return Steering(
        tuple(texts),
        Named(np.asarray(metrics), ("scale",), "metric", labels),
        np.stack(logits),
        tuple(scales),
    )
