"""The logit lens: what the model would say if each layer were its last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError, ModelError
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import depth, module, pipelined, place, texts_of, token_of

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.run import Run
    from flexmagic.client.session import Session

KEEP = """\
import torch
found = {"ids": [], "logprobs": [], "logits": [], "tracked": []}
def keep(scores):
    logprobs = scores.float().log_softmax(-1)
    best = logprobs.topk(top)
    found["ids"].append(best.indices)
    found["logprobs"].append(best.values)
    found["logits"].append(scores.float().gather(-1, best.indices))
    found["tracked"].append(logprobs[..., tracked])
    for name, values in found.items():
        setattr(save, name, torch.stack(values))
"""
CALLED = """\
for site in sites:
    scores = UNEMBED(NORM(model[site]))
    keep(scores)
logits = model.output.logits
save.off = (scores - logits).abs().max() / logits.abs().max()
"""
CARRIED = """\
h = model[site]
model[last] = h
keep(model.output.logits)
"""
TOLERANCE = 0.02
"""Further off than this, and not by rounding, is a model that does more to its logits."""


@dataclass(frozen=True, eq=False)
class Lens:
    """The ``k`` likeliest tokens after each layer at each position, likeliest first.

    ``logprobs`` and ``logits``: ``[layer, batch, position, k]``, float32, and ``ids`` likewise; layer 0 is
    what enters the first layer, layer ``n`` what leaves the ``n``-th. ``texts``: of every token in ``ids``.
    ``tracked``: log-probabilities ``[layer, batch, position, token]`` of the tokens that were asked for.
    """

    ids: NDArray[np.int64]
    logprobs: Named
    logits: Named
    tracked: Named
    texts: dict[int, str]
    tokens: list[list[str]]
    name: str = "logit lens"

    def text(self, layer: int = -1, position: int = -1, row: int = 0) -> str:
        """The likeliest token at a place."""
        return self.texts[int(self.ids[layer, row, position, 0])]

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each of the ``k`` tokens at each place, with its text: what a data frame takes."""
        out = self.logprobs.rows()
        for row, i in zip(out, self.ids.ravel(), strict=True):
            row["text"] = self.texts[int(i)]
            row["token"] = self.tokens[row["batch"]][row["position"]]
        return out

    def grid(self, row: int = 0) -> Shown:
        """Layers by positions of one row of the batch: the likeliest token, coloured by its probability."""
        ids, chance = self.ids[:, row], np.exp(self.logprobs.values[:, row])
        texts = [[self.texts[int(best[0])] for best in layer] for layer in ids]
        notes = [
            [
                [(self.texts[int(i)], float(p)) for i, p in zip(*each, strict=True)]
                for each in zip(*pair, strict=True)
            ]
            for pair in zip(ids, chance, strict=True)
        ]
        labels = {"layer": self.logprobs.labels["layer"], "position": ("token", tuple(self.tokens[row]))}
        shown = Named(chance[..., 0], ("layer", "position"), "probability", labels)
        return shown.grid(f"{self.name}: probability of the likeliest token", texts=texts, notes=notes)

    def _ipython_display_(self) -> None:
        self.grid()._ipython_display_()

    def __repr__(self) -> str:
        """What is likeliest at the last position of the first row, layer by layer."""
        told = " → ".join(repr(self.text(layer)) for layer in range(len(self.ids)))
        return f"<Lens {self.logprobs!r}; last position: {told}>"


def logit_lens(
    session: Session,
    inputs: Any,
    *,
    top: int = 5,
    track: Sequence[str | int] = (),
    progress: Any = None,
) -> Lens:
    """Read the residual stream after each layer with the model's own final norm and unembedding.

    ``inputs``: as in :meth:`Session.run`. ``top``: so many likeliest tokens of each place travel, and no
    more. ``track``: tokens, by text or id, whose log-probability is followed through all layers. Enabled
    hooks act. One forward; over pipeline stages, where no rank has all modules, one for each layer, in which
    that layer's output takes the place of the last one's.

    Raises :class:`SiteError` for a model without the standard names ``final_norm`` and ``unembed``, and
    :class:`ModelError` for one that does more to its logits, of which this lens would not be true.
    Source: nostalgebraist, "interpreting GPT: the logit lens", LessWrong 2020.
    """
    if top < 1:
        raise InputError(f"A lens shows 1 token or more at each place, not {top}.")
    model = session.model
    layers = depth(model)
    names = ["blocks.0.resid_pre", *(f"blocks.{n}.resid_post" for n in range(layers))]
    sites = [str(place(model, name)[0]) for name in names]
    ids = [token_of(session, token) for token in track]
    given = {"top": top, "tracked": ids}
    if pipelined(model):
        first, found = _carried(session, inputs, sites, given, progress)
    else:
        norm, unembed = module(model, "final_norm"), module(model, "unembed")
        code = KEEP + CALLED.replace("UNEMBED", unembed).replace("NORM", norm)
        first = session.trace(inputs, code, given={**given, "sites": sites}, progress=progress)
        found = {name: _array(first.context[name]) for name in ("ids", "logprobs", "logits", "tracked")}
        off = float(first.context["off"])
        if not off < TOLERANCE:
            msg = (
                f"The lens of the last layer is {off:.1%} off the model's logits: this model does more to "
                "them than its final norm and unembedding, so that its lens would not be true."
            )
            raise ModelError(msg)
    tokens = [list(row) for row in first.tokens] or [[str(i) for i in row] for row in first.ids]
    first.release()
    return lens_of(session, found, tokens, ids)


def lens_of(
    session: Session,
    found: Mapping[str, NDArray[Any]],
    tokens: list[list[str]],
    tracked: Sequence[int],
    name: str = "logit lens",
) -> Lens:
    """A lens from what was found at ``[layer, batch, position]``, the tokens read and those followed."""
    known = sorted({int(i) for i in found["ids"].ravel()} | set(tracked))
    texts = dict(zip(known, texts_of(session, known), strict=True))
    layers = len(found["ids"]) - 1
    layer = {"layer": ("after", ("input", *(f"layer {n}" for n in range(layers))))}
    dims = ("layer", "batch", "position")
    wanted = {**layer, "target": ("text", tuple(texts[i] for i in tracked))}
    return Lens(
        ids=found["ids"],
        logprobs=Named(found["logprobs"], (*dims, "k"), "logprob", layer),
        logits=Named(found["logits"], (*dims, "k"), "logit", layer),
        tracked=Named(found["tracked"], (*dims, "target"), "logprob", wanted),
        texts=texts,
        tokens=tokens,
        name=name,
    )


def _carried(
    session: Session, inputs: Any, sites: list[str], given: dict[str, Any], progress: Any
) -> tuple[Run, dict[str, NDArray[Any]]]:
    """Over stages: each layer's output in the place of the last one's, whose own is the last."""
    made = [
        session.trace(
            inputs, KEEP + CARRIED, given={**given, "site": site, "last": sites[-1]}, progress=progress
        )
        for site in sites
    ]
    found = {
        name: np.concatenate([_array(run.context[name]) for run in made])
        for name in ("ids", "logprobs", "logits", "tracked")
    }
    for run in made[:-1]:
        run.release()
    return made[-1], found


def _array(tensor: Any) -> NDArray[Any]:
    """What a trace saved, as numpy has it."""
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
