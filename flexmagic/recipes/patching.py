"""Activation patching: one prompt runs with values of another, place by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexmagic.errors import InputError
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import depth, ids_of, place, texts_of, token_of

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.session import Session
    from flexmagic.layout.heads import Heads

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEADS = ("attn.z", "attn.q", "attn.k", "attn.v")
"""What is patched whole, and what head by head."""
Target = tuple[str, tuple[int, int] | None]
"""A site of the model, and the columns of a head in it."""
PATCH = """\
(site, columns), places = target, list(places)
x = model[site]
new, old = x[other, places], x[row, places]
if columns is None:
    save.changed = not new.equal(old)
    x[row, places] = new
else:
    start, stop = columns
    save.changed = not new[:, start:stop].equal(old[:, start:stop])
    x[row, places, start:stop] = new[:, start:stop]
logits = model.output.logits[row]
save.value = {metric}
"""
PLAIN = """\
whole = model.output.logits
logits = whole[0]
save.clean = {metric}
logits = whole[1]
save.corrupt = {metric}
"""


@dataclass(frozen=True, eq=False)
class Patching:
    """How far patching one place takes a prompt to the other: 0 changes nothing, 1 is the other's metric.

    ``effect``: ``[layer, position]``; of heads ``[layer, head]``; with groups of positions their dim
    ``group`` is the last. ``metric``: the same, as measured. ``tokens``: the ids of the names in the metric.
    ``clean`` and ``corrupt``: the metric of both prompts unpatched. ``denoising``: clean values went into the
    corrupt prompt, and not the reverse.
    """

    effect: Named
    metric: Named
    clean: float
    corrupt: float
    denoising: bool
    site: str
    tokens: dict[str, int]

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each place with its effect and metric: what a data frame takes."""
        return [
            {**row, "metric": value}
            for row, value in zip(self.effect.rows(), self.metric.values.ravel().tolist(), strict=True)
        ]

    def largest(self, count: int = 5) -> list[dict[str, Any]]:
        """The places with the largest effects of either sign, first the largest."""
        return sorted(self.rows(), key=lambda row: -abs(row["effect"]))[:count]

    def grid(self, group: int = 0) -> Shown:
        """Layers by positions, or layers by heads, of several groups of positions for one of them."""
        how = "clean into corrupt" if self.denoising else "corrupt into clean"
        effect = self.effect.at(group=group) if len(self.effect.dims) > 2 else self.effect
        return effect.grid(f"patching {self.site}, {how}: effect")

    def _ipython_display_(self) -> None:
        self.grid()._ipython_display_()

    def __repr__(self) -> str:
        """What was patched, both metrics, and where the effect was largest."""
        kept = {k: v for k, v in self.largest(1)[0].items() if k not in {"effect", "metric"}}
        best = ", ".join(f"{k} {v}" for k, v in kept.items())
        return (
            f"<Patching {self.site}: clean {self.clean:.4g}, corrupt {self.corrupt:.4g}; "
            f"largest effect {self.largest(1)[0]['effect']:.3f} at {best}>"
        )


def patching(
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
    """Run one prompt with the other's activation at each layer and position, or in each head.

    ``clean``, ``corrupt``: two texts, or lists of ids, of equally many tokens. ``metric``: an expression over
    ``logits``, those of the patched prompt ``[seq, vocab]``, and the names of ``tokens``, which are ids:
    ``"logits[-1, right] - logits[-1, wrong]"`` with ``tokens={"right": " Mary", "wrong": " John"}``.

    ``site``: ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out`` or ``mlp_out``, by layer and
    position; or, head by head at all positions together, ``attn.z``, ``attn.q``, ``attn.k`` or ``attn.v``.
    ``denoising``: put clean values into the corrupt prompt, which shows what is enough for the clean answer;
    else corrupt ones into the clean prompt, which shows what it needs. ``layers``: these only.
    ``positions``: places that are patched together, by a name for each such group (default: each position
    by itself). Enabled hooks act.

    The effect is ``(metric - before) / (other - before)``, where before and other are the metrics of both
    prompts unpatched; where the values of both prompts are equal bit for bit, it is 0.

    Raises :class:`InputError` for prompts that do not fit each other or the metric, :class:`SiteError` for a
    site that the model has not. Source: Vig et al. 2020 (arXiv 2004.12265), Meng et al. 2022 (2202.05262),
    Wang et al. 2022 (2211.00593).
    """
    model = session.model
    if site not in (*SITES, *HEADS):
        raise InputError(f"{site!r} cannot be patched: choose one of {', '.join((*SITES, *HEADS))}.")
    ids, texts = _prompts(session, clean, corrupt)
    named = _tokens(session, metric, tokens or {})
    before = session.trace(ids, PLAIN.format(metric=metric), given=named)
    clean_value, corrupt_value = (_scalar(before.context[name], metric) for name in ("clean", "corrupt"))
    before.release()
    if clean_value == corrupt_value:
        raise InputError(f"{metric} is {clean_value:.4g} for both prompts, so that there is nothing to find.")
    layers = list(range(depth(model))) if layers is None else list(layers)
    groups = _groups(len(ids[0]), positions, together=site in HEADS)
    targets, shape = _targets([place(model, f"blocks.{n}.{site}") for n in layers])
    given = {**named, "row": int(denoising), "other": int(not denoising)}
    over: dict[str, list[Any]] = {"target": targets, "places": list(groups.values())}
    values, changed = _swept(session, ids, metric, over, given=given, progress=progress)
    start, end = (corrupt_value, clean_value) if denoising else (clean_value, corrupt_value)
    effect = np.where(changed, (values - start) / (end - start), 0.0)
    along = None if site in HEADS and positions is None else "group" if positions else "position"
    labels = {"group": ("positions", tuple(groups)), "position": ("token", tuple(texts))}
    shown = Named(
        effect.reshape(*shape, *effect.shape[1:] * (along is not None)),
        (*("layer", "head")[: len(shape)], *([along] if along else [])),
        "effect", {along: labels[along]} if along else {}, {"layer": tuple(layers)},
    )  # fmt: skip
    measured = replace(shown, values=values.reshape(shown.values.shape), name="metric")
    return Patching(shown, measured, clean_value, corrupt_value, denoising, site, named)


def _swept(
    session: Session, ids: list[list[int]], metric: str, over: dict[str, list[Any]], **options: Any
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """``[target, places]``: the metric with each patched there, and whether that changed anything there."""
    sweep = session.sweep(ids, PATCH.format(metric=metric), over, **options)
    values, changed = sweep["value"].astype(np.float64), sweep["changed"].astype(np.bool_)
    for run in sweep.runs:
        run.release()
    return values, changed


def _prompts(session: Session, clean: Any, corrupt: Any) -> tuple[list[list[int]], list[str]]:
    """Both prompts' ids, and at each position the token, or both where they differ."""
    ids = ids_of(session, [clean, corrupt])
    if len(ids[0]) != len(ids[1]):
        cut = [", ".join(repr(text) for text in texts_of(session, row)) for row in ids]
        msg = (
            f"The prompts have {len(ids[0])} and {len(ids[1])} tokens, and patching puts position on "
            f"position. Clean: {cut[0]}. Corrupt: {cut[1]}."
        )
        raise InputError(msg)
    if ids[0] == ids[1]:
        raise InputError("The prompts are the same, so that there is nothing to patch.")
    clean_texts, corrupt_texts = (texts_of(session, row) for row in ids)
    return ids, [a if a == b else f"{a} |{b}" for a, b in zip(clean_texts, corrupt_texts, strict=True)]


def _tokens(session: Session, metric: str, tokens: Mapping[str, str | int]) -> dict[str, int]:
    """The ids of a metric's names; raises :class:`InputError` for what is no expression or no name."""
    try:
        compile(metric, "<metric>", "eval")
    except SyntaxError as error:
        raise InputError(f"The metric {metric!r} is no expression: {error.msg}.") from None
    taken = {"logits", "whole", "row", "other", "target", "places", "x", "new", "old"}
    for name in tokens:
        if not name.isidentifier() or name in taken | {"site", "columns", "start", "stop", "model", "save"}:
            raise InputError(
                f"A token cannot be named {name!r}: choose another word, such as right or wrong."
            )
    return {name: token_of(session, token) for name, token in tokens.items()}


def _groups(
    length: int, positions: Mapping[str, Sequence[int]] | None, *, together: bool
) -> dict[str, list[int]]:
    """The positions that are patched together, by name."""
    if positions is None:
        every = list(range(length))
        return {"all positions": every} if together else {str(at): [at] for at in every}
    groups = {name: [int(at) for at in places] for name, places in positions.items()}
    for name, places in groups.items():
        if not places or any(not -length <= at < length for at in places):
            raise InputError(f"positions {name!r}: {places} are not in the {length} tokens of the prompts.")
    if not groups:
        raise InputError('positions needs a group or more, such as {"the names": [2, 4]}.')
    return groups


def _targets(
    places: Sequence[tuple[Any, Heads | None]],
) -> tuple[list[Target], tuple[int, ...]]:
    """The sites to be patched, with the columns of each head where there are heads; and how many of each."""
    out: list[Target] = []
    counts = {0 if heads is None else len(heads.starts) for _, heads in places}
    if len(counts) > 1:
        raise InputError("The layers have different numbers of heads: give layers that are alike.")
    for site, heads in places:
        starts = [] if heads is None else [(start, start + heads.width) for start in heads.starts]
        out += [(str(site), columns) for columns in starts] or [(str(site), None)]
    count = counts.pop() if counts else 0
    return out, (len(places), count) if count else (len(places),)


def _scalar(value: Any, metric: str) -> float:
    """The one number that a metric is to give."""
    found = np.asarray(value.detach().cpu().float().numpy() if hasattr(value, "detach") else value)
    if found.ndim:
        raise InputError(f"{metric} gave the shape {list(found.shape)}, and a metric is one number.")
    return float(found)
