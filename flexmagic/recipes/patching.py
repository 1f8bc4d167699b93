"""Activation patching: one prompt runs with values of another, place by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.recipes.effects import Effects, swept
from flexmagic.recipes.prompts import number, tokens_of, two_prompts
from flexmagic.recipes.where import Where

if TYPE_CHECKING:
    from flexmagic import Shown
    from flexmagic.client.session import Session

PATCH = """\
(base, site, columns), places = target, list(places)
start, stop = columns or (0, None)
before = None if base is None else model[base]
x = model[site]
whole = x if before is None else x + before
new, old = whole[other, places, start:stop], whole[row, places, start:stop]
save.changed = not new.equal(old)
if step == 1 and before is None:
    x[row, places, start:stop] = new
else:
    x[row, places, start:stop] += step * (new - old)
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
class Patching(Effects):
    """How far patching one place takes a prompt to the other: 0 changes nothing, 1 is the other's metric.

    ``effect``: ``[layer, position]``; of heads ``[layer, head]``; with groups of positions their dim
    ``group`` is the last. ``metric``: the same, as measured. ``tokens``: the ids of the names in the metric.
    ``clean`` and ``corrupt``: the metric of both prompts unpatched. ``denoising``: clean values went into the
    corrupt prompt, and not the reverse. ``estimated``: the values are those of attribution patching.
    """

    clean: float
    corrupt: float
    denoising: bool
    site: str
    tokens: dict[str, int]
    estimated: bool = False

    def grid(self, group: int = 0) -> Shown:
        """Layers by positions, or layers by heads, of several groups of positions for one of them."""
        how = "clean into corrupt" if self.denoising else "corrupt into clean"
        effect = self.effect.at(group=group) if len(self.effect.dims) > 2 else self.effect
        what = "attribution patching" if self.estimated else "patching"
        return effect.grid(f"{what} {self.site}, {how}: effect")

    def __repr__(self) -> str:
        """What was patched, both metrics, and where the effect was largest."""
        return f"<Patching {self.site}: clean {self.clean:.4g}, corrupt {self.corrupt:.4g}; {self._best()}>"


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
    step: float = 1.0,
    memory: int | None = None,
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
    by itself). ``step``: so much of the way to the other's value. ``memory``: bytes that patched prompts
    may take together on a rank, as in :meth:`Session.sweep`. Enabled hooks act.

    The effect is ``(metric - before) / (other - before) / step``, where before and other are the metrics of
    both prompts unpatched; where the values of both prompts are equal bit for bit, it is 0.

    Raises :class:`InputError` for prompts that do not fit each other or the metric, :class:`SiteError` for a
    site that the model has not. Source: Vig et al. 2020 (arXiv 2004.12265), Meng et al. 2022 (2202.05262),
    Wang et al. 2022 (2211.00593).
    """
    if not step:
        raise InputError("A step of 0 patches nothing: give a part of the way, such as step=0.01.")
    ids, texts = two_prompts(session, clean, corrupt)
    where = Where.of(session.model, site, texts, layers, positions)
    named = tokens_of(session, metric, tokens)
    ends = both_ends(session, ids, metric, named)
    given = {**named, "row": int(denoising), "other": int(not denoising), "step": float(step)}
    over: dict[str, list[Any]] = {"target": where.targets, "places": list(where.groups.values())}
    values, changed = swept(
        session, ids, PATCH.format(metric=metric), over, memory=memory, given=given, progress=progress
    )
    start, end = ends[::-1] if denoising else ends
    effect = np.where(changed, (values - start) / (end - start) / step, 0.0)
    measured = where.values(values, "metric")
    return Patching(where.values(effect, "effect"), measured, *ends, denoising, site, named)


def both_ends(
    session: Session, ids: list[list[int]], metric: str, named: Mapping[str, int]
) -> tuple[float, float]:
    """The metric of both prompts as they are; raises :class:`InputError` if it is the same, or no number."""
    before = session.trace(ids, PLAIN.format(metric=metric), given=named)
    clean, corrupt = (number(before.context[name], metric) for name in ("clean", "corrupt"))
    before.release()
    if clean == corrupt:
        raise InputError(f"{metric} is {clean:.4g} for both prompts, so that there is nothing to find.")
    return clean, corrupt
