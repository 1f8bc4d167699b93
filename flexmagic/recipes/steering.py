"""Steering: a direction, added to the residual stream while the model generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError
from flexmagic.recipes.aside import LOGITS, hooked, persistent
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import place, token_of

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.session import Session

HOOK_NAMES = ("x", "site", "index", "step", "ctx", "module", "rank", "modules", "persistent")
"""What a hook's code sees, so that no token has such a name."""
ADD, READ = "steering adds", "steering reads"
"""The hooks by name, and the value that the first takes from run to run."""
STEER = f"""\
vector, scale = persistent["{ADD}"]
x += scale * torch.as_tensor(vector).to(x)
"""
MEASURE = f"""\
{{named}}
logits = x[0]
ctx["{READ} first"], ctx["{READ} metric"] = logits[-1], {{metric}}
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

    @property
    def monotonic(self) -> bool:
        """Whether the metric rises, or falls, with every step of the scale."""
        order = np.argsort(self.scales)
        steps = np.diff(self.metric.values[order])
        return bool((steps > 0).all() or (steps < 0).all())

    def lines(self) -> Shown:
        """The metric over the scale; the title says whether it is monotonic."""
        from flexmagic import lines

        order = np.argsort(self.scales)
        title = f"steering: {'monotonic' if self.monotonic else 'not monotonic'} in the scale"
        where = [f"{self.scales[at]:g}" for at in order]
        return lines({"metric": self.metric.values[order]}, where, title=title, over="scale")

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

    Raises :class:`InputError`, or :class:`SiteError` for a site that the model has not. Source: Turner et al.
    2023 (arXiv 2308.10248).
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
    for name in tokens or {}:
        if not name.isidentifier() or name in {*HOOK_NAMES, "logits", "torch"}:
            raise InputError(f"A token cannot be named {name!r}: choose another word, such as happy.")
    named = "\n".join(f"{name} = {token_of(session, token)}" for name, token in (tokens or {}).items())
    texts, metrics, logits = [], [], []
    added = np.asarray(vector, dtype=np.float32)
    measure = {READ: ([LOGITS], MEASURE.format(named=named, metric=metric))}
    with (
        persistent(session, ADD),
        hooked(session, {ADD: ([str(own)], STEER)}),
        hooked(session, measure, step=0),
    ):
        for scale in scales:
            session.persistent[ADD] = added, float(scale)
            run = session.generate(prompt, max_new_tokens, progress=progress)
            texts.append(run.text[0] if run.text else "")
            metrics.append(float(run.context[f"{READ} metric"]))
            logits.append(run.context[f"{READ} first"].float().cpu().numpy())
            run.release()
    labels = {"scale": ("times", tuple(f"{s:g}" for s in scales))}
    return Steering(
        tuple(texts),
        Named(np.asarray(metrics), ("scale",), "metric", labels),
        np.stack(logits),
        tuple(scales),
    )
