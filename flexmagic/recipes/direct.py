"""Direct logit attribution: the residual stream's parts, each with what it adds to a metric by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import ModelError
from flexmagic.layout.sites import Site
from flexmagic.recipes.final_norm import frozen_norm
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import depth, place
from flexmagic.recipes.prompts import loss_of, one_prompt, tokens_of
from flexmagic.recipes.where import columns_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic import Shown
    from flexmagic.client.model import Model
    from flexmagic.client.run import Run
    from flexmagic.client.session import Session

    Array = NDArray[np.float64]

CLOSE = {"float32": 1e-4, "float64": 1e-6}
"""How far sums may be off, relative to the sizes that are summed up; :data:`ROUGH` in other dtypes."""
ROUGH = 0.05


@dataclass(frozen=True, eq=False)
class LogitAttribution:
    """What each part of the residual stream adds to a metric that is linear in the logits.

    ``parts``: ``[component]``: the embedding, each layer's attention and MLP, the biases of final norm and
    unembedding; they sum to ``metric``. ``heads``: ``[layer, head]``, of the attentions' parts; what is left
    of these, the bias of their last projection, is ``attention_bias``, ``[layer]``. ``accumulated``:
    ``[layer]``, the metric of all parts up to there, without biases. ``gap``: how far the parts' sum is from
    ``metric``, relative to the sum of their sizes.
    """

    parts: Named
    accumulated: Named
    metric: float
    heads: Named | None = None
    attention_bias: Named | None = None

    @property
    def gap(self) -> float:
        """How far the parts' sum is from the metric, relative to the sum of their sizes."""
        values = self.parts.values
        return abs(float(values.sum()) - self.metric) / max(float(np.abs(values).sum()), 1e-30)

    def part(self, name: str) -> float:
        """What one component adds, such as ``attention 2``, ``MLP 0`` or ``embedding``."""
        return float(self.parts.values[self.parts.labels["component"][1].index(name)])

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each component: what a data frame takes."""
        return self.parts.rows()

    def largest(self, count: int = 5) -> list[dict[str, Any]]:
        """The components that add most, of either sign; first the largest."""
        return sorted(self.rows(), key=lambda row: -abs(row["contribution"]))[:count]

    def grid(self) -> Shown:
        """Layers by heads; without heads the components in one row."""
        if self.heads is not None:
            return self.heads.grid("what each head adds to the metric")
        row = Named(self.parts.values[None], ("metric", "component"), "contribution", self.parts.labels)
        return row.grid("what each part adds to the metric")

    def lines(self) -> Shown:
        """The metric as it accumulates from layer to layer."""
        from flexmagic import lines

        at = self.accumulated.labels["layer"][1]
        return lines({"metric": self.accumulated.values}, at, title="accumulated residual", over="after")

    def _ipython_display_(self) -> None:
        self.grid()._ipython_display_()

    def __repr__(self) -> str:
        """The metric and the largest components."""
        best = ", ".join(f"{row['part']} {row['contribution']:+.3g}" for row in self.largest(3))
        return f"<LogitAttribution: metric {self.metric:.4g} = {best}, …>"


def logit_attribution(
    session: Session,
    prompt: Any,
    metric: str,
    *,
    tokens: Mapping[str, str | int] | None = None,
    heads: bool = True,
    progress: Any = None,
) -> LogitAttribution:
    """Share out a metric over the parts that were added up in the residual stream.

    ``prompt``: a text or a list of ids. ``metric``, ``tokens``: as in :func:`patching`, here linear in the
    logits, such as the difference of two. The direction that it reads is its gradient behind the final norm,
    whose scale is taken as it was in this run, so that the rest is linear; what norm it is, and how each
    projection joins its heads, is found by what they did. The parts' sum is compared with the metric. Of
    ``heads``, the weights of the attentions' last projections travel to the notebook, else only activations
    at the positions that the metric reads. Enabled hooks act, but one that edits behind a part is not one
    of the parts.

    Raises :class:`SiteError` for a model without the standard names, and :class:`ModelError` if the parts do
    not sum up to the metric. Source: Elhage et al. 2021, "A mathematical framework for transformer
    circuits"; nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    named = tokens_of(session, metric, tokens)
    ids, _ = one_prompt(session, prompt)
    own = _Sites.of(session.model, depth(session.model), heads=heads)
    run = session.run([ids], backward=loss_of(metric, named), capture=own.all, progress=progress)
    found, close = _shared_out(session, run, own, heads=heads)
    run.release()
    if not found.gap <= close:
        msg = (
            f"The parts of the residual stream sum up to {found.parts.values.sum():.4g} where the metric is "
            f"{found.metric:.4g}: it is not linear in the logits, or the model does more to them than its "
            "final norm and unembedding."
        )
        raise ModelError(msg)
    return found


def _shared_out(session: Session, run: Run, own: _Sites, *, heads: bool) -> tuple[LogitAttribution, float]:
    """All parts of what a run's metric was, and how close they should come to it."""
    direction = _at(run, own.direction)
    places = np.flatnonzero(np.abs(direction).sum(-1))
    direction = direction[places]
    close = CLOSE.get(run[own.streams[0]].dtype, ROUGH)
    norm = frozen_norm(
        _at(run, own.streams[-1])[places], _at(run, own.final)[places],
        _parameter(session, own.norm, "weight"), _parameter(session, own.norm, "bias"), close,
    )  # fmt: skip
    onto = norm.onto(direction)

    def share(site: str) -> float:
        return float((_at(run, site)[places] * onto).sum())

    layers = len(own.attentions)
    names = ["embedding", *(f"{what} {n}" for n in range(layers) for what in ("attention", "MLP"))]
    added = [site for pair in zip(own.attentions, own.mlps, strict=True) for site in pair]
    values = [share(site) for site in (own.streams[0], *added)]
    names += ["final norm's bias", "unembedding's bias"]
    values += [float((direction * norm.offset).sum()), _unembedded(session, run, own, places)]
    after = {"layer": ("after", ("input", *(f"layer {n}" for n in range(layers))))}
    found = LogitAttribution(
        Named(np.array(values), ("component",), "contribution", {"component": ("part", tuple(names))}),
        Named(np.array([share(site) for site in own.streams]), ("layer",), "contribution", after),
        float(run.loss or 0.0),
        *(_by_head(session, run, own, places, onto, close=close) if heads else ()),
    )
    return found, close


@dataclass(frozen=True)
class _Sites:
    """The model's own sites for all that is added up; ``streams``: before the first layer and after each."""

    streams: list[str]
    attentions: list[str]
    mlps: list[str]
    results: list[str]
    norm: str
    final: str
    direction: str
    unembed: str
    read: str

    @classmethod
    def of(cls, model: Model, layers: int, *, heads: bool) -> _Sites:
        def own(name: str) -> str:
            return str(place(model, name)[0])

        results = [place(model, f"blocks.{n}.attn.z")[0] for n in range(layers)] if heads else []
        return cls(
            [own("blocks.0.resid_pre"), *(own(f"blocks.{n}.resid_post") for n in range(layers))],
            [own(f"blocks.{n}.attn_out") for n in range(layers)],
            [own(f"blocks.{n}.mlp_out") for n in range(layers)],
            [str(site) for site in results],
            place(model, "final_norm")[0].path,
            own("final_norm"),
            own("final_norm:grad_output"),
            place(model, "unembed")[0].path,
            own("unembed:grad_output"),
        )

    @property
    def all(self) -> list[str]:
        """What the run captures."""
        ends = [self.final, self.direction, self.read]
        return list(dict.fromkeys([*self.streams, *self.attentions, *self.mlps, *self.results, *ends]))


def _at(run: Run, site: str) -> Array:
    """A site's ``[seq, features]`` of the only row."""
    return run[site][0].astype(np.float64)


def _parameter(session: Session, path: str, name: str) -> Array | None:
    """A module's whole parameter, if it has one."""
    whole = f"{path}.{name}"
    if whole not in session.model.names(Site(whole, "grad")):
        return None
    found: Array = session.model.parameter(whole).double().numpy()
    return found


def _unembedded(session: Session, run: Run, own: _Sites, places: NDArray[np.int64]) -> float:
    """What the unembedding's bias adds."""
    bias = _parameter(session, own.unembed, "bias")
    return 0.0 if bias is None else float((_at(run, own.read)[places] * bias).sum())


def _by_head(
    session: Session, run: Run, own: _Sites, places: NDArray[np.int64], onto: Array, *, close: float
) -> tuple[Named, Named]:
    """What each head adds, and the biases beside them; raises :class:`ModelError` if they are not the sum."""
    model = session.model
    values, biases = [], []
    for n, result in enumerate(own.results):
        _, heads = place(model, f"blocks.{n}.attn.z")
        assert heads is not None  # z is by head
        path = Site.parse(result).path
        weight, bias = _parameter(session, path, "weight"), _parameter(session, path, "bias")
        z, added = _at(run, result)[places], _at(run, own.attentions[n])[places]
        rest = added - (0.0 if bias is None else bias)
        ways = [] if weight is None else [weight.T, weight]
        joined = [w for w in ways if w.shape == (z.shape[-1], rest.shape[-1])]
        joined.sort(key=lambda w: float(np.abs(z @ w - rest).max()))
        if not joined or np.abs(z @ joined[0] - rest).max() > close * np.abs(added).max():
            msg = (
                f"Layer {n}'s attention adds something else than its heads through {path}, so that their "
                "parts cannot be told: leave heads out (heads=False)."
            )
            raise ModelError(msg)
        back = onto @ joined[0].T
        values.append([float((z[:, a:b] * back[:, a:b]).sum()) for a, b in columns_of(heads)])
        biases.append(0.0 if bias is None else float((onto * bias).sum()))
    return (
        Named(np.array(values), ("layer", "head"), "contribution"),
        Named(np.array(biases), ("layer",), "contribution"),
    )
