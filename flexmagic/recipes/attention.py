"""Attention: the patterns of all heads, other patterns in their place, and edges that are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from flexmagic.errors import InputError, ModelError
from flexmagic.recipes.effects import Effects, swept
from flexmagic.recipes.named import Named
from flexmagic.recipes.places import place
from flexmagic.recipes.prompts import number, one_prompt, tokens_of, two_prompts
from flexmagic.recipes.where import columns_of, layers_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flexmagic import Activation, Shown
    from flexmagic.client.run import Run
    from flexmagic.client.session import Session

    Array = NDArray[np.float64]

Edges = Sequence[tuple[int, int]]
"""Pairs of positions: who looks, and at whom."""
CLOSE = {"float32": 1e-4, "float64": 1e-6}
ROUGH = 0.05
PLAIN = """\
logits = model.output.logits[0]
save.value = {metric}
"""
REPLACED = """\
import torch
values_at, result_at, parts = target
values = model[values_at][0]
z = model[result_at]
changed = False
for columns, place, pattern in parts:
    new = torch.as_tensor(pattern, dtype=torch.float32, device=z.device) @ values[:, slice(*columns)].float()
    old, new = z[0, :, slice(*place)], new.to(z.dtype)
    changed = changed or not new.equal(old)
    old[:] = new
save.changed = changed
logits = model.output.logits[0]
save.value = {metric}
"""


@dataclass(frozen=True, eq=False)
class Attention:
    """The attention patterns of one run; nothing but what is looked at travels.

    ``sites``: of each layer. ``texts``: the prompt's tokens.
    """

    run: Run
    sites: dict[int, str]
    texts: tuple[str, ...]

    def layer(self, layer: int) -> Activation:
        """A layer's patterns ``[batch, head, query, key]`` as the viewer shows them: all heads."""
        return self.run[self.sites[layer]]

    def head(self, layer: int, head: int) -> Named:
        """One head's pattern, ``[query, key]``."""
        labels = {dim: (f"{dim} token", self.texts) for dim in ("query", "key")}
        return Named(self.layer(layer)[0, head], ("query", "key"), "attention", labels)

    def pattern(self) -> Named:
        """All of them, ``[layer, head, query, key]``."""
        values = np.stack([self.layer(n).numpy()[0] for n in self.sites])
        dims = ("layer", "head", "query", "key")
        labels = {dim: (f"{dim} token", self.texts) for dim in ("query", "key")}
        return Named(values, dims, "attention", labels, {"layer": tuple(self.sites)})

    def _ipython_display_(self) -> None:
        self.layer(next(iter(self.sites)))._ipython_display_()

    def __repr__(self) -> str:
        """How many layers and positions."""
        return f"<Attention: {len(self.sites)} layers, {len(self.texts)} positions>"


@dataclass(frozen=True, eq=False)
class AttentionEffect(Effects):
    """What becomes of a metric when attention is changed in one place.

    ``effect``: ``[layer, head]``, or ``[layer]`` with all heads of a layer together, with groups of edges
    their dim ``edges`` last: the metric minus ``plain``, that of the model as it is. ``metric``: as measured.
    """

    plain: float
    what: str

    def grid(self, edges: int = 0) -> Shown:
        """Layers by heads, of several groups of edges for one of them; or layers by groups of edges."""
        effect = self.effect.at(edges=edges) if len(self.effect.dims) > 2 else self.effect
        if len(effect.dims) == 1:
            effect = Named(effect.values[None], ("all heads", "layer"), effect.name, {}, effect.numbers)
        return effect.grid(f"{self.what}: effect")

    def __repr__(self) -> str:
        """The plain metric, and where the effect was largest."""
        return f"<{self.what}: plain {self.plain:.4g}; {self._best()}>"


def attention(
    session: Session, prompt: Any, *, layers: Sequence[int] | None = None, progress: Any = None
) -> Attention:
    """The patterns of all heads on one prompt, a text or a list of ids. Enabled hooks act.

    Raises :class:`SiteError` for a model without attention patterns: load it with ``attn="eager"``.
    """
    ids, texts = one_prompt(session, prompt)
    sites = {
        n: str(place(session.model, f"blocks.{n}.attn.pattern")[0]) for n in layers_of(session.model, layers)
    }
    run = session.run([ids], capture=list(sites.values()), progress=progress)
    return Attention(run, sites, tuple(texts))


def attention_knockout(
    session: Session,
    prompt: Any,
    metric: str,
    *,
    edges: Mapping[str, Edges] | None = None,
    together: bool = False,
    tokens: Mapping[str, str | int] | None = None,
    layers: Sequence[int] | None = None,
    memory: int | None = None,
    progress: Any = None,
) -> AttentionEffect:
    """Cut edges of attention in one head after the other, or all edges, and see what becomes of a metric.

    ``edges``: groups by name of pairs ``(query, key)``, positions from the start or, negative, from the end.
    Their weight is shared out over the query's other keys, as if their score had been minus infinity;
    a query without any other key gets nothing. Without ``edges`` a head gives nothing at all.
    ``together``: all heads of a layer at once. ``metric``, ``tokens``, ``layers`` and ``memory``: as in
    :func:`patching`, over the prompt's own logits. Enabled hooks act.

    Raises :class:`InputError`, :class:`SiteError` for a model without patterns, values and results by head
    (load it with ``attn="eager"``), and :class:`ModelError` if results are not patterns times values.
    Source: Michel et al. 2019 (arXiv 1905.10650) for heads, Geva et al. 2023 (2304.14767) for edges.
    """
    ids, _ = one_prompt(session, prompt)
    groups = (
        {"all": None} if edges is None else {name: _pairs(name, of, len(ids)) for name, of in edges.items()}
    )
    if not groups:
        raise InputError('edges needs a group or more, such as {"back to the name": [(-1, 4)]}.')
    what = "attention knocked out" if edges is None else "attention edges cut"
    heads = _Heads.of(session, [ids], layers, progress)
    changed = [
        [[_without(pattern, pairs) for pairs in groups.values()] for pattern in patterns]
        for patterns in heads.patterns
    ]
    return _measured(
        session, ids, heads, changed, None if edges is None else tuple(groups), metric=metric, tokens=tokens,
        what=what, together=together, memory=memory, progress=progress,
    )  # fmt: skip


def attention_replacement(
    session: Session,
    prompt: Any,
    pattern: Any,
    metric: str,
    *,
    together: bool = False,
    tokens: Mapping[str, str | int] | None = None,
    layers: Sequence[int] | None = None,
    memory: int | None = None,
    progress: Any = None,
) -> AttentionEffect:
    """Give one head after the other another pattern, its values being its own, and see what it changes.

    ``pattern``: a prompt of equally many tokens, of which each head gets its own pattern; or weights
    ``[query, key]`` that each head gets, such as uniform ones. The rest is as in :func:`attention_knockout`.

    Raises as :func:`attention_knockout`.
    """
    text = isinstance(pattern, str) or np.ndim(pattern) == 1
    ids, _ = one_prompt(session, prompt)
    if text:
        pair, _ = two_prompts(session, prompt, pattern, ("Prompt", "Other"))
        heads = _Heads.of(session, pair, layers, progress)
        changed = [[[p] for p in patterns] for patterns in heads.others]
    else:
        given = np.asarray(pattern, dtype=np.float64)
        if given.shape != (len(ids), len(ids)):
            raise InputError(f"The pattern is {list(given.shape)}, the prompt has {len(ids)} tokens.")
        heads = _Heads.of(session, [ids], layers, progress)
        changed = [[[given] for _ in patterns] for patterns in heads.patterns]
    what = "attention patterns replaced"
    return _measured(
        session, ids, heads, changed, None, metric=metric, tokens=tokens,
        what=what, together=together, memory=memory, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Heads:
    """Where the heads of some layers are, and their patterns ``[head, query, key]`` on a prompt, and another.

    ``places``: for each layer the sites of values and results; ``columns``: in both, for each head.
    """

    layers: tuple[int, ...]
    places: list[tuple[str, str]]
    columns: list[list[tuple[tuple[int, int], tuple[int, int]]]]
    patterns: list[Array]
    others: list[Array]

    @classmethod
    def of(
        cls, session: Session, ids: list[list[int]], layers: Sequence[int] | None, progress: Any
    ) -> _Heads:
        """Measure the patterns, and that a head's result is its pattern times its values."""
        model = session.model
        chosen = layers_of(model, layers)
        names = [[f"blocks.{n}.attn.{what}" for what in ("pattern", "v", "z")] for n in chosen]
        found = [[place(model, name) for name in each] for each in names]
        run = session.run(ids, capture=[str(s) for each in found for s, _ in each], progress=progress)
        places, columns, patterns, others = [], [], [], []
        for n, ((pattern, _), (values, of_values), (result, of_result)) in zip(chosen, found, strict=True):
            assert of_values is not None  # both are by head
            assert of_result is not None
            seen = run[str(pattern)].numpy().astype(np.float64)
            each = columns_of(of_values), columns_of(of_result)
            shared = len(each[1]) // len(each[0])
            pairs = [(each[0][head // shared], own) for head, own in enumerate(each[1])]
            v, z = (run[str(site)][0].astype(np.float64) for site in (values, result))
            made = [seen[0, head] @ v[:, a:b] for head, ((a, b), _) in enumerate(pairs)]
            off = max(np.abs(m - z[:, c:d]).max() for m, (_, (c, d)) in zip(made, pairs, strict=True))
            if not off <= CLOSE.get(run[str(result)].dtype, ROUGH) * np.abs(z).max():
                msg = (
                    f"What layer {n}'s heads give is not their patterns times their values, so that another "
                    "pattern's result cannot be told."
                )
                raise ModelError(msg)
            places.append((str(values), str(result)))
            columns.append(pairs)
            patterns.append(seen[0])
            others.append(seen[-1])
        run.release()
        return cls(chosen, places, columns, patterns, others)


def _measured(
    session: Session,
    ids: list[int],
    heads: _Heads,
    changed: Sequence[Sequence[Sequence[Array]]],
    groups: tuple[str, ...] | None,
    *,
    metric: str,
    tokens: Mapping[str, str | int] | None,
    what: str,
    together: bool,
    memory: int | None,
    progress: Any,
) -> AttentionEffect:
    """The metric with each head's patterns changed; ``changed``: by layer, head and group."""
    counts = {len(of) for of in heads.columns}
    if len(counts) > 1 and not together:
        raise InputError("The layers have different numbers of heads: give layers that are alike.")
    named = tokens_of(session, metric, tokens)
    before = session.trace([ids], PLAIN.format(metric=metric), given=named, progress=progress)
    plain = number(before.context["value"], metric)
    before.release()
    targets: list[Any] = []
    for (values, result), columns, patterns in zip(heads.places, heads.columns, changed, strict=True):
        parts = [
            [(*where, p.astype(np.float32)) for p in of_head]
            for where, of_head in zip(columns, patterns, strict=True)
        ]
        each = (
            [list(group) for group in zip(*parts, strict=True)]
            if together
            else [[p] for of in parts for p in of]
        )
        targets += [(values, result, of) for of in each]
    code = REPLACED.format(metric=metric)
    found, moved = swept(
        session, [ids], code, {"target": targets}, memory=memory, given=named, progress=progress
    )
    dims = {"layer": len(heads.layers)}
    dims |= {} if together else {"head": counts.pop()}
    dims |= {} if groups is None else {"edges": len(groups)}
    labels = {} if groups is None else {"edges": ("which", groups)}
    shape = tuple(dims.values())
    measured = Named(found.reshape(shape), tuple(dims), "metric", labels, {"layer": heads.layers})
    effect = np.where(moved, found - plain, 0.0).reshape(shape)
    return AttentionEffect(replace(measured, values=effect, name="effect"), measured, plain, what)


def _pairs(name: str, edges: Edges, length: int) -> list[tuple[int, int]]:
    """Edges with positions counted from the start; raises :class:`InputError` for what is none."""
    out = []
    for query, key in edges:
        if not (-length <= query < length and -length <= key < length):
            raise InputError(f"edges {name!r}: {(query, key)} is not in the {length} tokens of the prompt.")
        out.append((query % length, key % length))
        if out[-1][1] > out[-1][0]:
            raise InputError(f"edges {name!r}: position {out[-1][0]} cannot look ahead at {out[-1][1]}.")
    return out


def _without(pattern: Array, pairs: Sequence[tuple[int, int]] | None) -> Array:
    """A pattern ``[query, key]`` without edges, the rest scaled to the sum that each query had; or zeros."""
    if pairs is None:
        return np.zeros_like(pattern)
    out = pattern.copy()
    for query, key in pairs:
        out[query, key] = 0
    left = out.sum(-1, keepdims=True)
    return out * np.divide(pattern.sum(-1, keepdims=True), left, out=np.zeros_like(left), where=left > 0)
