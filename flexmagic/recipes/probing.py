"""Linear probes: what can be read off the activations of each layer, and a control that cannot."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError
from flexmagic.recipes.aside import batches, encoded
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import depth, place

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.session import Session

STEPS, CLOSE = 100, 1e-10
"""Newton steps that a probe's classifier may take, and the gradient at which it has arrived."""


@dataclass(frozen=True, eq=False)
class Probe:
    """How well a label is read off each layer by a linear map, on texts that it was not fitted to.

    ``score``: ``[layer]``, the share of held-out examples that are classified rightly; ``control``: the
    same for random labels; ``chance``: the share of the commonest class among the held-out examples.
    ``maps``: ``[layer, class, width + 1]``, the last column being the bias; ``scale``: ``[layer]``, what the
    activations are divided by first. ``classes``: what the labels are, in the order of the maps.
    """

    score: Named
    control: Named
    chance: float
    maps: NDArray[np.float64]
    scale: NDArray[np.float64]
    classes: tuple[Any, ...]
    site: str

    @property
    def selectivity(self) -> Named:
        """``[layer]``: by how much the score is better than the control's."""
        return replace(self.score, values=self.score.values - self.control.values, name="selectivity")

    def predict(self, activations: Any, layer: int) -> list[Any]:
        """The classes that the probe of a layer gives to activations ``[..., width]``, in their order."""
        at = list(self.score.numbers["layer"]).index(layer)
        x = np.asarray(activations, dtype=np.float64).reshape(-1, self.maps.shape[-1] - 1)
        said = _with_ones(x / self.scale[at]) @ self.maps[at].T
        return [self.classes[i] for i in said.argmax(-1)]

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each layer: what a data frame takes."""
        both = zip(self.score.rows(), self.control.values.tolist(), strict=True)
        return [{**row, "control": control, "chance": self.chance} for row, control in both]

    def lines(self) -> Shown:
        """Score, control and chance over the layers."""
        from flexmagic import lines

        chance = np.full(len(self.score.values), self.chance)
        series = {"probe": self.score.values, "control task": self.control.values, "chance": chance}
        where = [f"layer {n}" for n in self.score.numbers["layer"]]
        return lines(series, where, title=f"probe at {self.site}: held-out accuracy", over="layer")

    def _ipython_display_(self) -> None:
        self.lines()._ipython_display_()

    def __repr__(self) -> str:
        """The best layer, and what chance would give."""
        best = max(self.rows(), key=lambda row: float(row["accuracy"]))
        return (
            f"<Probe {self.site}, {len(self.classes)} classes: {best['accuracy']:.1%} in layer "
            f"{best['layer']}, control {best['control']:.1%}, chance {self.chance:.1%}>"
        )


def probe(
    session: Session,
    texts: Sequence[Any],
    labels: Sequence[Any],
    *,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    position: int = -1,
    keys: Sequence[Hashable] | None = None,
    held_out: float = 0.3,
    penalty: float = 1e-3,
    rows: int = 16,
    seed: int = 0,
    progress: Any = None,
) -> Probe:
    """Fit a linear classifier to the activations of each layer, and test it on texts that it has not seen.

    ``labels``: a class for each text, read at ``position``; or for each text a list of a class for each of
    its tokens, all of which are then examples. ``site``: ``resid_pre``, ``resid_mid``, ``resid_post``,
    ``attn_out`` or ``mlp_out``. The texts run in batches of ``rows`` and of each only the values at the
    site and the position come to the notebook, where the classifier is fitted: multinomial logistic
    regression, in float64, its mean loss in nats plus ``penalty / 2`` times the sum of its squared weights,
    on activations divided by their root mean square. ``held_out`` is the share of texts, of
    every class, drawn under ``seed``, that it is tested on. Enabled hooks act.

    The control task: each of ``keys`` gets a random class, as often as it occurs among the labels, and the
    same classifier is fitted to that. By default a key is the token that is labelled, or, of one label for
    each text, the text itself, so that a control above chance shows what a probe knows by heart.

    Raises :class:`InputError` for labels that do not fit the texts, and :class:`SiteError`. Source: Alain &
    Bengio 2016 (arXiv 1610.01644); the control: Hewitt & Liang 2019 (1909.03368).
    """
    ids = encoded(session, texts)
    given, each = _labels(ids, labels)
    layers = list(range(depth(session.model))) if layers is None else list(layers)
    named = list(keys) if keys is not None else _keys(ids, each=each)
    if len(named) != len(given):
        raise InputError(f"keys names {len(named)} examples, and there are {len(given)}.")
    classes = tuple(dict.fromkeys(given))
    if len(classes) < 2:
        raise InputError(f"All labels are {classes[0]!r}, so that there is nothing to tell apart.")
    draw = np.random.default_rng(seed)
    tested = _tested(ids, given, draw, held_out, each=each)
    truth = np.array([classes.index(label) for label in given])
    of_key = {key: int(truth[draw.integers(len(truth))]) for key in dict.fromkeys(named)}
    drawn = np.array([of_key[key] for key in named])
    sites = [f"blocks.{n}.{site}" for n in layers]
    x = _activations(session, ids, sites, rows, None if each else position, progress)
    scale = np.sqrt((x[:, ~tested] ** 2).mean((1, 2)))
    scale[scale == 0] = 1.0
    x = x / scale[:, None, None]
    found = [_scored(of, truth, tested, len(classes), penalty) for of in x]
    control = [_scored(of, drawn, tested, len(classes), penalty)[0] for of in x]
    numbers = {"layer": tuple(layers)}
    return Probe(
        score=Named(np.array([score for score, _ in found]), ("layer",), "accuracy", numbers=numbers),
        control=Named(np.array(control), ("layer",), "control", numbers=numbers),
        chance=float(np.bincount(truth[tested]).max() / tested.sum()),
        maps=np.stack([weights for _, weights in found]), scale=scale, classes=classes, site=site,
    )  # fmt: skip


def fitted(
    x: NDArray[np.float64], labels: NDArray[np.int64], classes: int, penalty: float
) -> NDArray[np.float64]:
    """Logistic regression: the ``[class, width + 1]`` of the least loss, for examples ``x [n, width]``.

    The loss is convex, with a penalty strictly so but for a bias that all classes share, whose mean is made
    0: the result does not depend on how it is found. The bias is not penalised. Found by Newton's method,
    each step by conjugate gradients, in the span of the examples, where the weights of the least penalty lie.
    """
    basis, of = np.linalg.qr(x.T)  # x is of.T @ basis.T
    examples, wanted = _with_ones(of.T), np.eye(classes)[labels]
    free = np.append(np.full(of.shape[0], penalty), 0.0)
    weights = np.zeros((classes, len(free)))

    def loss(at: NDArray[np.float64]) -> float:
        said = examples @ at.T
        most = said.max(1, keepdims=True)
        logs = said - most - np.log(np.exp(said - most).sum(1, keepdims=True))
        return float(-(logs * wanted).sum(1).mean() + (free * at**2).sum() / 2)

    value = loss(weights)
    for _ in range(STEPS):
        said = examples @ weights.T
        chance = np.exp(said - said.max(1, keepdims=True))
        chance /= chance.sum(1, keepdims=True)
        gradient = (chance - wanted).T @ examples / len(x) + free * weights
        if np.abs(gradient).max() < CLOSE:
            break

        def curved(step: NDArray[np.float64], p: NDArray[np.float64] = chance) -> NDArray[np.float64]:
            moved = examples @ step.T
            out: NDArray[np.float64] = (p * (moved - (p * moved).sum(1, keepdims=True))).T @ examples / len(
                x
            ) + free * step
            return out

        step = _solved(curved, -gradient)
        length, downhill = 1.0, float((gradient * step).sum())
        while (new := loss(weights + length * step)) > value + 1e-4 * length * downhill and length > CLOSE:
            length /= 2
        weights, value = weights + length * step, new
        weights[:, -1] -= weights[:, -1].mean()  # what all classes share changes nothing
    out: NDArray[np.float64] = np.concatenate([weights[:, :-1] @ basis.T, weights[:, -1:]], axis=1)
    return out


def _solved(
    times: Callable[[NDArray[np.float64]], NDArray[np.float64]], wanted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What a positive definite map takes to ``wanted``, by conjugate gradients."""
    found, left = np.zeros_like(wanted), wanted.copy()
    along, norm = left.copy(), float((left**2).sum())
    first = norm
    for _ in range(2 * wanted.size):
        if norm <= 1e-20 * first:
            break
        moved = times(along)
        share = norm / float((along * moved).sum())
        found += share * along
        left -= share * moved
        norm, before = float((left**2).sum()), norm
        along = left + norm / before * along
    return found


def _scored(
    x: NDArray[np.float64], labels: NDArray[np.int64], tested: NDArray[np.bool_], classes: int, penalty: float
) -> tuple[float, NDArray[np.float64]]:
    """The share of held-out examples that a classifier fitted to the others gets right, and its weights."""
    weights = fitted(x[~tested], labels[~tested], classes, penalty)
    said = (_with_ones(x[tested]) @ weights.T).argmax(-1)
    return float((said == labels[tested]).mean()), weights


def _with_ones(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def _activations(  # noqa: PLR0917 - what is read, and how
    session: Session, ids: list[list[int]], sites: list[str], rows: int, position: int | None, progress: Any
) -> NDArray[np.float64]:
    """``[site, example, width]``: of each text the value at one position, or those at all, text by text."""
    own = [str(place(session.model, site)[0]) for site in sites]
    found: dict[int, list[NDArray[Any]]] = {}
    for part in batches(ids, rows):
        if position is not None and not -len(ids[part[0]]) <= position < len(ids[part[0]]):
            raise InputError(f"position {position} is not in the {len(ids[part[0]])} tokens of a text.")
        run = session.run([ids[i] for i in part], capture=own, progress=progress)
        values = [run[site].numpy() if position is None else run[site][:, position] for site in own]
        run.release()
        for row, text in enumerate(part):
            found[text] = [value[row] for value in values]
    joined = [[np.atleast_2d(found[text][at]) for text in range(len(ids))] for at in range(len(own))]
    return np.stack([np.concatenate(of_site) for of_site in joined]).astype(np.float64)


def _labels(ids: list[list[int]], labels: Sequence[Any]) -> tuple[list[Any], bool]:
    """One label for each example, and whether each token is one."""
    if len(labels) != len(ids):
        raise InputError(f"There are {len(ids)} texts and {len(labels)} labels.")
    each = all(isinstance(of, (list, tuple)) for of in labels)
    if not each:
        return list(labels), False
    wrong = next((at for at, of in enumerate(labels) if len(of) != len(ids[at])), None)
    if wrong is not None:
        raise InputError(f"Text {wrong} has {len(ids[wrong])} tokens and {len(labels[wrong])} labels.")
    return [label for of in labels for label in of], True


def _keys(ids: list[list[int]], *, each: bool) -> list[Hashable]:
    return [token for row in ids for token in row] if each else [tuple(row) for row in ids]


def _tested(
    ids: list[list[int]], given: Sequence[Any], draw: np.random.Generator, share: float, *, each: bool
) -> NDArray[np.bool_]:
    """Which examples are held out: all of a text, or none of it; equal texts together.

    Of texts with one label each, the same share of every class.
    """
    of: dict[Any, list[tuple[int, ...]]] = {}
    for kind, label in {
        tuple(row): label for row, label in zip(ids, ids if each else given, strict=True)
    }.items():
        of.setdefault(None if each else label, []).append(kind)
    out: set[tuple[int, ...]] = set()
    for kinds in of.values():
        count = round(share * len(kinds))
        if not 0 < count < len(kinds):
            raise InputError(
                f"held_out={share} of {len(kinds)} different texts of a class leaves none on one side."
            )
        out.update(kinds[i] for i in draw.permutation(len(kinds))[:count].tolist())
    return np.array([tuple(row) in out for row in ids for _ in (row if each else [0])])
