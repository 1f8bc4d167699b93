"""Causal tracing: which hidden states bring an answer back after its subject was made unreadable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError
from flexmagic.recipes.effects import Effects, swept
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import depth, place
from flexmagic.recipes.prompts import groups_of, one_prompt, tokens_of
from flexmagic.recipes.where import SITES, edited, layers_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic import Shown
    from flexmagic.client.model import Model
    from flexmagic.client.session import Session

PROBABILITY = "logits[-1].softmax(-1)[answer]"
PLAIN = """\
save.spread = model[site].float().std()
save.best = model.output.logits[0, -1].argmax()
"""
TRACED = """\
import torch
places = list(places)
x = model[site]
drawn = torch.randn(samples, len(subject), x.shape[-1], generator=torch.Generator().manual_seed(seed))
x[1:, subject] += (noise * drawn).to(x)
changed = False
for base, place in target:
    before = None if base is None else model[base]
    h = model[place]
    whole = h if before is None else h + before
    kept, old = whole[:1, places].expand(samples, -1, -1), whole[1:, places]
    changed = changed or not kept.equal(old)
    h[1:, places] = kept if before is None else h[1:, places] + (kept - old)
values = []
for logits in model.output.logits:
    values.append(torch.as_tensor({metric}).float())
save.value, save.changed = torch.stack(values), changed
"""
"""Row 0 is the prompt as it is; each of the others has noise of its own."""


@dataclass(frozen=True, eq=False)
class CausalTracing(Effects):
    """What restoring hidden states gives back of an answer, as the mean over draws of the noise.

    ``effect``: ``[layer, position]``, or ``[layer, group]``, the metric with the states restored minus that
    without: the indirect effect. ``metric``: the same, as measured. ``clean``: the metric of the prompt as it
    is, ``corrupt``: with noise on the subject and nothing restored. ``noise``: the standard deviation of the
    noise. ``subject``: the positions that had it. ``answer``: the token's id.
    """

    clean: float
    corrupt: float
    noise: float
    subject: tuple[int, ...]
    answer: int
    site: str
    window: int

    def grid(self) -> Shown:
        """Layers by positions: the metric with the states there restored."""
        around = f", {self.window} layers each" if self.window > 1 else ""
        return self.metric.grid(f"restoring {self.site}{around}: {self.corrupt:.3g} to {self.clean:.3g}")

    def __repr__(self) -> str:
        """Both metrics, and where restoring gave most."""
        ends = f"clean {self.clean:.4g}, with noise {self.corrupt:.4g}"
        return f"<CausalTracing {self.site}: {ends}; {self._best()}>"


def causal_tracing(
    session: Session,
    prompt: Any,
    subject: str | Sequence[int],
    *,
    answer: str | int | None = None,
    metric: str = PROBABILITY,
    tokens: Mapping[str, str | int] | None = None,
    site: str = "resid_post",
    window: int = 1,
    samples: int = 10,
    noise: float = 3.0,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    positions: Mapping[str, Sequence[int]] | None = None,
    memory: int | None = None,
    progress: Any = None,
) -> CausalTracing:
    """Add noise to the subject's embeddings, and restore hidden states of the clean run, place by place.

    ``prompt``: a text or a list of ids. ``subject``: a part of the text, of which every token that it
    touches gets noise, or positions. ``answer``: a token by text or id (default: what the model says).
    ``metric``: an expression over ``logits`` ``[seq, vocab]``, ``answer`` and the names of ``tokens``; the
    default is the probability of the answer.

    ``site``: ``resid_post`` and so on, ``attn_out`` or ``mlp_out``. ``window``: so many layers around each
    are restored together, ``[layer - window // 2, layer + (window + 1) // 2)``, as Meng et al. do with 10
    of 48 for attention and MLPs. ``samples``: draws of the noise, whose standard deviation is ``noise`` times
    that of the prompt's embeddings; they follow from ``seed`` alone, whatever the number of ranks.
    ``layers``: around these only. ``positions``, ``memory``: as in :func:`patching`. Enabled hooks act.

    Raises :class:`InputError` for a subject that is not in the prompt, :class:`SiteError` for a site that
    the model has not. Source: Meng et al. 2022, "Locating and editing factual associations in GPT"
    (arXiv 2202.05262).
    """
    if samples < 1 or window < 1:
        raise InputError(f"Give 1 sample and a window of 1 layer or more, not {samples} and {window}.")
    ids, texts = one_prompt(session, prompt)
    at, embed = subject_of(texts, subject), str(place(session.model, "embed")[0])
    chosen, groups = layers_of(session.model, layers), groups_of(len(ids), positions, together=False)
    spread, best = _looked(session, ids, embed, progress)
    named = tokens_of(session, metric, {**(tokens or {}), "answer": best if answer is None else answer})
    spread *= noise
    given = {**named, "site": embed, "subject": list(at), "noise": spread, "samples": samples, "seed": seed}
    code, batch = TRACED.format(metric=metric), [ids] * (samples + 1)
    ends = _ends(session, batch, code, {**given, "target": (), "places": ()}, progress)
    if ends.ndim > 1:
        raise InputError(f"{metric} gave the shape {list(ends.shape[1:])}, and a metric is one number.")
    targets = _targets(session.model, site, chosen, window)
    over: dict[str, list[Any]] = {"target": targets, "places": list(groups.values())}
    found, changed = swept(session, batch, code, over, memory=memory, given=given, progress=progress)
    values = found[..., 1:]
    along = "position" if positions is None else "group"
    label = ("token", tuple(texts)) if positions is None else ("positions", tuple(groups))
    effect = np.where(changed, (values - ends[1:]).mean(-1), 0.0)
    shown = Named(effect, ("layer", along), "effect", {along: label}, {"layer": chosen})
    return CausalTracing(
        shown, replace(shown, values=values.mean(-1), name="metric"), float(ends[0]), float(ends[1:].mean()),
        spread, at, named["answer"], site, window,
    )  # fmt: skip


def _targets(model: Model, site: str, layers: Sequence[int], window: int) -> list[Any]:
    """The sites that are restored together, for each layer."""
    if site not in SITES:
        raise InputError(f"{site!r} cannot be restored: choose one of {', '.join(SITES)}.")
    return [tuple(edited(model, n, site) for n in each) for each in windows_of(layers, window, depth(model))]


def _looked(session: Session, ids: list[int], embed: str, progress: Any) -> tuple[float, int]:
    """The standard deviation of the prompt's embeddings, and the likeliest next token."""
    run = session.trace([ids], PLAIN, given={"site": embed}, progress=progress)
    spread, best = float(run.context["spread"]), int(run.context["best"])
    run.release()
    return spread, best


def _ends(
    session: Session, batch: list[list[int]], code: str, given: dict[str, Any], progress: Any
) -> NDArray[np.float64]:
    """The metric of the prompt as it is, and with each draw of noise, nothing being restored."""
    run = session.trace(batch, code, given=given, progress=progress)
    found: NDArray[np.float64] = run.context["value"].double().cpu().numpy()
    run.release()
    return found


def subject_of(texts: Sequence[str], subject: str | Sequence[int]) -> tuple[int, ...]:
    """The positions of a subject in a prompt's tokens: all that a text touches, where it is said last.

    Raises :class:`InputError` for a text or a position that is not there.
    """
    if not isinstance(subject, str):
        (places,) = groups_of(len(texts), {"the subject": subject}, together=False).values()
        return tuple(sorted({place % len(texts) for place in places}))
    whole, wanted = "".join(texts), subject.strip()
    first = whole.rfind(wanted)
    if first < 0 or not wanted:
        said = ", ".join(repr(text) for text in texts)
        raise InputError(f"{subject!r} is not in the prompt: {said}. Give its positions instead.")
    ends = np.cumsum([len(text) for text in texts]).tolist()
    starts = [0, *ends[:-1]]
    last = first + len(wanted)
    return tuple(n for n, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < last and b > first)


def windows_of(layers: Sequence[int], window: int, count: int) -> list[tuple[int, ...]]:
    """The layers around each that there are; raises :class:`InputError` for a layer that is not there."""
    for layer in layers:
        if not 0 <= layer < count:
            raise InputError(f"There is no layer {layer}: the model has 0 to {count - 1}.")
    return [tuple(range(max(0, n - window // 2), min(count, n + (window + 1) // 2))) for n in layers]
