"""A part of a whole tensor, spans of some of its dims: how it lies, and where it is in a rank's piece.

With it only the part need be exchanged where a hook is known to see and change nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from flexmagic.layout.layout import Block, Layout, Span

Spans = tuple[Span, ...]

Places = Mapping[int, Spans]
"""By dim, the spans of the whole that belong to the part, ascending and apart."""


@dataclass(frozen=True)
class Part:
    """``layout``: of the part as a tensor of its own; ``here``: by rank and dim, where a piece has it."""

    layout: Layout
    here: tuple[Mapping[int, Spans], ...]

    @classmethod
    def of(cls, whole: Layout, picked: Places) -> Part:
        """The part of a whole; dims that are not named belong to it in full."""
        blocks: list[Block | None] = []
        here: list[dict[int, Spans]] = []
        for block in whole.blocks:
            held = {} if block is None else {dim: _held(block[dim], spans) for dim, spans in picked.items()}
            here.append({dim: local for dim, (_, local) in held.items()})
            blocks.append(
                None
                if block is None
                else tuple(held[dim][0] if dim in held else spans for dim, spans in enumerate(block))
            )
        shape = tuple(_length(picked[d]) if d in picked else n for d, n in enumerate(whole.shape))
        return cls(replace(whole, shape=shape, blocks=tuple(blocks)), tuple(here))

    def cut(self, rank: int, piece: torch.Tensor) -> torch.Tensor:
        """What a rank's piece holds of the part."""
        for dim, spans in self.here[rank].items():
            piece = piece[(slice(None),) * dim + (_index(spans, piece.device),)]
        return piece

    def pasted(self, rank: int, piece: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """A copy of a rank's piece, with what it holds of the part replaced."""
        out = piece.clone(memory_format=torch.contiguous_format)
        _paste(out, sorted(self.here[rank].items()), new)
        return out


def spans_of(positions: Iterable[int]) -> Spans:
    """Ascending positions as spans."""
    out: list[Span] = []
    for position in positions:
        if out and out[-1][1] == position:
            out[-1] = (out[-1][0], position + 1)
        else:
            out.append((position, position + 1))
    return tuple(out)


def _paste(out: torch.Tensor, places: Sequence[tuple[int, Spans]], new: torch.Tensor) -> None:
    if not places:
        out.copy_(new)
        return
    (dim, spans), rest = places[0], places[1:]
    found = _index(spans, out.device)
    index = (slice(None),) * dim + (found,)
    inner = out[index]
    _paste(inner, rest, new)
    if not isinstance(found, slice):
        out[index] = inner


def _index(spans: Spans, device: torch.device) -> slice | torch.Tensor:
    if len(spans) <= 1:
        return slice(*spans[0]) if spans else slice(0, 0)
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])


def _length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


def _held(block: Spans, picked: Spans) -> tuple[Spans, Spans]:
    """What a piece holds of what is picked: spans of the part, and of the piece, in the piece's order."""
    ours: list[Span] = []
    local: list[Span] = []
    at = 0
    for start, stop in block:
        before = 0
        for first, last in picked:
            low, high = max(start, first), min(stop, last)
            if low < high:
                _append(ours, (before + low - first, before + high - first))
                _append(local, (at + low - start, at + high - start))
            before += last - first
        at += stop - start
    return tuple(ours), tuple(local)


def _append(spans: list[Span], span: Span) -> None:
    if spans and spans[-1][1] == span[0]:
        spans[-1] = (spans[-1][0], span[1])
    else:
        spans.append(span)
