"""Path patching: how much of one place's effect reaches the answer through certain others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.recipes.effects import Effects, swept
from flexmagic.recipes.named import Named
from flexmagic.recipes.patching import both_ends
from flexmagic.recipes.places import depth, place
from flexmagic.recipes.prompts import tokens_of, two_prompts
from flexmagic.recipes.where import Columns, Where, columns_of

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.model import Model
    from flexmagic.client.session import Session

SENDERS = ("attn.z", "attn_out", "mlp_out")
PATH = """\
(_, sent, columns), places = target, list(places)
start, stop = columns or (0, None)
changed = False
for site, frozen, receivers in steps:
    x = model[site]
    if frozen:
        x[2] = x[0]
    if site == sent:
        x[2, places, start:stop] = x[1, places, start:stop]
    for first, last in receivers:
        changed = changed or not x[2, :, first:last].equal(x[0, :, first:last])
        x[3, :, first:last] = x[2, :, first:last]
save.changed = changed
logits = model.output.logits[3]
save.value = {metric}
"""
"""Rows: the prompt, the other one, the prompt with what is sent alone, and that of which it is received."""
_RECEIVER = re.compile(r"(?P<name>.+?)(?:\[(?P<head>\d+)\])?")


@dataclass(frozen=True, eq=False)
class PathPatching(Effects):
    """How far each sender moves the metric through the receivers: 0 not at all, 1 is the other prompt's.

    ``effect``: ``[layer, head]`` or ``[layer]``, with groups of positions their dim ``group`` is the last.
    ``metric``: the same, as measured; ``clean`` and ``corrupt``: that of both prompts unpatched.
    """

    clean: float
    corrupt: float
    senders: str
    receivers: tuple[str, ...]
    denoising: bool

    def grid(self, group: int = 0) -> Shown:
        """Layers by heads, of several groups of positions for one of them; layers alone are one row."""
        effect = self.effect
        if "head" in effect.dims and "group" in effect.dims:
            effect = effect.at(group=group)
        if len(effect.dims) == 1:
            effect = Named(effect.values[None], ("sender", "layer"), effect.name, {}, effect.numbers)
        return effect.grid(f"from {self.senders} to {', '.join(self.receivers)}: effect")

    def __repr__(self) -> str:
        """The path, both metrics, and the sender with the largest effect."""
        return (
            f"<PathPatching {self.senders} to {', '.join(self.receivers)}: clean {self.clean:.4g}, "
            f"corrupt {self.corrupt:.4g}; {self._best()}>"
        )


def path_patching(
    session: Session,
    clean: Any,
    corrupt: Any,
    metric: str,
    *,
    senders: str = "attn.z",
    receivers: str | Sequence[str] = (),
    through_mlps: bool = True,
    denoising: bool = False,
    tokens: Mapping[str, str | int] | None = None,
    layers: Sequence[int] | None = None,
    positions: Mapping[str, Sequence[int]] | None = None,
    memory: int | None = None,
    progress: Any = None,
) -> PathPatching:
    """Give receivers what they would get if one sender alone were that of the other prompt.

    ``senders``: ``attn.z``, each head of each of ``layers``, or ``attn_out`` or ``mlp_out``, each layer; at
    all positions, or in groups of ``positions``. ``receivers``: standard names, of heads with a number in
    brackets (``"blocks.2.attn.q[5]"``; without one all heads), at all positions; by default the last layer's
    ``resid_post``, which is the direct effect on the logits.

    A path goes from the sender along the residual stream, and ``through_mlps`` between, to a receiver: no
    attention on the way sees a change, nor, without ``through_mlps``, an MLP. In a first pass the sender has
    the other prompt's value, and attention (and MLPs) all others' values of the prompt itself; in a second
    one the receivers have what they had in the first, and everything after them is computed anew. All
    passes are rows of one forward. ``metric``, ``tokens``, ``denoising``, ``memory`` and the effect are as
    in :func:`patching`, but the default is to put corrupt values into the clean prompt. Where receivers get
    the prompt's own values bit for bit, it is 0. Enabled hooks act.

    Raises :class:`InputError` for prompts that do not fit each other or the metric, :class:`SiteError` for a
    site that the model has not. Source: Wang et al. 2022 (arXiv 2211.00593, appendix B), Goldowsky-Dill et
    al. 2023, "Localizing model behavior with path patching" (2304.05969).
    """
    if senders not in SENDERS:
        raise InputError(f"{senders!r} cannot send: choose one of {', '.join(SENDERS)}.")
    model = session.model
    ids, texts = two_prompts(session, clean, corrupt)
    where = Where.of(model, senders, texts, layers, positions or {"all positions": range(len(texts))})
    names = (receivers,) if isinstance(receivers, str) else tuple(receivers)
    names = names or (f"blocks.{depth(model) - 1}.resid_post",)
    steps = steps_of(model, senders, names, through_mlps=through_mlps)
    named = tokens_of(session, metric, tokens)
    ends = both_ends(session, ids, metric, named)
    this, other = ids[::-1] if denoising else ids
    over: dict[str, list[Any]] = {"target": where.targets, "places": list(where.groups.values())}
    values, changed = swept(
        session, [this, other, this, this], PATH.format(metric=metric), over,
        memory=memory, given={**named, "steps": steps}, progress=progress,
    )  # fmt: skip
    start, end = ends[::-1] if denoising else ends
    effect, measured = (
        shown if positions else shown.at(group=0)
        for shown in (
            where.values(np.where(changed, (values - start) / (end - start), 0.0), "effect"),
            where.values(values, "metric"),
        )
    )
    return PathPatching(effect, measured, *ends, senders, names, denoising)


Step = tuple[str, bool, list[tuple[int, int | None]]]
"""A site in the forward, whether it keeps the prompt's own value, and the columns that receive."""


def steps_of(model: Model, senders: str, receivers: Sequence[str], *, through_mlps: bool) -> list[Step]:
    """All sites that path patching asks for, in the order of the forward."""
    attention = "attn.z" if senders == "attn.z" else "attn_out"
    frozen = [attention] if through_mlps else [attention, "mlp_out"]
    kept = {str(place(model, f"blocks.{n}.{name}")[0]) for n in range(depth(model)) for name in frozen}
    sent = {str(place(model, f"blocks.{n}.{senders}")[0]) for n in range(depth(model))}
    received: dict[str, list[tuple[int, int | None]]] = {}
    for text in receivers:
        site, columns = _receiver(model, text)
        received.setdefault(site, []).extend([(0, None)] if columns is None else columns)
    order = {str(site): at for at, site in enumerate(model.rules)}
    sites = sorted(kept | sent | set(received), key=lambda site: order[site])
    return [(site, site in kept, received.get(site, [])) for site in sites]


def _receiver(model: Model, text: str) -> tuple[str, list[tuple[int, int]] | None]:
    """The site of a receiver and its columns; raises :class:`InputError` for a head that is not there."""
    match = _RECEIVER.fullmatch(text.strip())
    if match is None:
        raise InputError("A receiver has a name, such as blocks.2.attn.q[5] or blocks.3.resid_post.")
    if match["name"].endswith("resid_mid"):
        raise InputError(
            f"{text} cannot receive: name what reads it, such as attn_out, mlp_out or resid_post."
        )
    site, heads = place(model, match["name"])
    columns: Sequence[Columns] = [] if heads is None else columns_of(heads)
    if match["head"] is None:
        return str(site), None if heads is None else columns_of(heads)
    if int(match["head"]) >= len(columns):
        has = f"heads 0 to {len(columns) - 1}" if columns else "no heads"
        raise InputError(f"{text} cannot receive: {match['name']} has {has}.")
    assert heads is not None  # there are columns
    return str(site), [columns_of(heads)[int(match["head"])]]
