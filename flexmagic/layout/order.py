"""In which order pieces follow each other: shown by split weights, or by a site that holds the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmagic.layout.layout import Span, contiguous_spans
from flexmagic.layout.seen import Seen, Vector, WeightSplit, near
from flexmagic.layout.sites import Site

Spans = tuple[tuple[Span, ...], ...]
"""Per piece, in the order of the ranks that hold them first, the global spans it covers."""


@dataclass(frozen=True)
class Cut:
    """A tensor of ``ndim`` dims cut along one: who holds each piece first, and how long it is."""

    dim: int
    ndim: int
    holders: tuple[int, ...]
    sizes: tuple[int, ...]


def spans_by_weights(site: Site, cut: Cut, weights: Sequence[WeightSplit]) -> Spans | str:
    """The global spans of the pieces along the dim that is cut; or why they are not known.

    The module's own weight decides for what it takes and returns; what has no weight of its own
    follows the nearest weights, which must all be split in plain order or one way.
    """
    length, holders = sum(cut.sizes), cut.holders
    own = [w for w in weights if w.module == site.path and cut.dim == cut.ndim - 1]
    own = [w for w in own if w.dim == (0 if site.port in {"output", "grad_output"} else 1)]
    near_by = [w for w in own if w.whole == length] or _nearest(site.path, weights)
    near_by = [w for w in near_by if all(w.spans[rank] != () for rank in holders)]
    if not near_by:
        return "no split weight near this site shows in which order its pieces follow each other"
    starts = [[part[0][0] for rank in holders if (part := w.spans[rank])] for w in near_by]
    # plain over all ranks does not say that these ranks have it so: theirs must ascend too
    ascending = all(at == sorted(at) for at in starts) and any(len(set(at)) == len(holders) for at in starts)
    if all(_plain(w) for w in near_by) and ascending:
        return tuple(contiguous_spans(list(cut.sizes)))
    fitting = {
        spans
        for w in near_by
        if w.whole == length and (spans := _of(w, holders)) and tuple(map(_length, spans)) == cut.sizes
    }
    if len(fitting) == 1:
        return fitting.pop()
    odd_ones = [w for w in near_by if not _plain(w)]
    if ascending and all(w.whole != length and _fused(w, near_by) for w in odd_ones):
        return tuple(contiguous_spans(list(cut.sizes)))
    found = next((w.why for w in odd_ones if w.why), "")
    if found:
        return found
    odd = ", ".join(sorted({w.module for w in odd_ones} or {w.module for w in near_by}))
    return f"the weights of {odd} are not split in plain rank order"


def _of(weight: WeightSplit, holders: Sequence[int]) -> Spans | None:
    spans = [weight.spans[rank] for rank in holders]
    known = [s for s in spans if s]
    return tuple(known) if len(known) == len(spans) else None


def _length(spans: tuple[Span, ...]) -> int:
    return sum(stop - start for start, stop in spans)


def _plain(weight: WeightSplit) -> bool:
    """Whether the distinct parts, in rank order, lie one after the other and cover the whole."""
    parts = list(dict.fromkeys(spans for spans in weight.spans if spans != ()))
    at = 0
    for spans in parts:
        if spans is None or len(spans) != 1 or spans[0][0] != at:
            return False
        at = spans[0][1]
    return at == weight.whole


def _fused(weight: WeightSplit, near_by: Sequence[WeightSplit]) -> bool:
    """Whether it is several of one length in one, each in plain order as another weight of that length is."""
    held = [spans for spans in dict.fromkeys(weight.spans) if spans]
    parts = len(held[0]) if held else 0
    if parts < 2 or None in weight.spans or any(len(spans) != parts for spans in held):
        return False
    length = weight.whole // parts
    if weight.whole % parts or not any(w.whole == length and _plain(w) for w in near_by):
        return False
    moved = [
        tuple(((spans[n][0] - n * length, spans[n][1] - n * length),) for spans in held) for n in range(parts)
    ]
    return all(_plain(WeightSplit(weight.module, weight.dim, length, inside)) for inside in moved)


def _nearest(path: str, weights: Sequence[WeightSplit]) -> list[WeightSplit]:
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        prefix = ".".join(parts[:depth])
        inside = [w for w in weights if not prefix or w.module == prefix or w.module.startswith(prefix + ".")]
        if inside:
            return inside
    return []


def positions(piece: Seen, whole: Sequence[Vector], dim: int, norm: float) -> list[int] | None:
    """Where a piece's slices along ``dim`` stand among those of the whole; ``None`` if that is not sure."""
    out = []
    for mine in piece.slices[dim]:
        found = [at for at, other in enumerate(whole) if near(mine, other, norm)]
        if len(found) != 1:
            return None
        out.append(found[0])
    return out
