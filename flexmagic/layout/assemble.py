"""Putting a whole tensor together from its pieces, taking it apart, and reading only a part.

Suffix-free on purpose: all functions work for any number of dims. Blocks may hold several spans
per dim (interleaved or permuted pieces), so a piece is copied span by span.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from flexmagic.errors import InputError, LayoutError
from flexmagic.layout.layout import Block, Layout, Span

Index = tuple[slice, ...]


def assemble(layout: Layout, pieces: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The whole tensor, shape ``layout.shape``, from local pieces keyed by rank.

    Replicas are taken from the first rank that offers one; addends of a partial sum are added in
    rank order. Raises :class:`LayoutError` if a piece has another shape or dtype than it should, if
    a part of the whole is missing (a gap is never filled with zeros) or there twice, and for a
    partial sum of a dtype that knows no sum: bool and the 8-bit floats.
    """
    wanted = layout.owners()
    missing = [rank for rank in wanted if rank not in pieces]
    if missing or not wanted:
        msg = (
            f"the pieces of rank {', '.join(map(str, missing))} are missing" if missing else "no rank has it"
        )
        raise LayoutError(msg)
    _check_cover(layout.shape, frozenset(block for block in layout.blocks if block is not None))
    first = pieces[wanted[0]]
    if layout.partial:
        _check_sum(first.dtype)
    held = tuple(layout.blocks[rank] or () for rank in wanted)
    for rank in wanted:
        piece = pieces[rank]
        if tuple(piece.shape) != layout.local_shape(rank):
            msg = f"rank {rank} holds {tuple(piece.shape)}, the layout says {layout.local_shape(rank)}"
            raise LayoutError(msg)
        if piece.dtype != first.dtype:
            msg = f"rank {rank} holds {piece.dtype}, rank {wanted[0]} {first.dtype}"
            raise LayoutError(msg)
    row = None if layout.partial else _in_a_row(held)
    if row is not None:
        dim, order = row
        return torch.cat([pieces[wanted[at]] for at in order], dim).contiguous()
    whole = torch.empty(layout.shape, dtype=first.dtype, device=first.device)
    written: set[Block] = set()
    for rank, block in zip(wanted, held, strict=True):
        piece = pieces[rank]
        for there, here in _copies(block):
            if block in written:
                whole[there] += piece[here]
            else:
                whole[there] = piece[here]
        written.add(block)
    return whole


def _check_sum(dtype: torch.dtype) -> None:
    if dtype == torch.bool or (dtype.is_floating_point and dtype.itemsize == 1):
        msg = f"the ranks hold addends of a sum, and {dtype} values cannot be added without loss"
        raise LayoutError(msg)


def split(layout: Layout, rank: int, whole: torch.Tensor) -> torch.Tensor | None:
    """The rank's own piece of a whole tensor, contiguous; ``None`` where it holds nothing.

    Under a partial sum the whole goes to the first addend of each block, zeros to the others, so
    that the sum is the whole. They are negative zeros where there are such: adding them keeps the
    bits of everything, the sign of a zero included. Raises :class:`LayoutError` for a partial sum
    of a dtype that knows no sum.
    """
    block, shape = layout.blocks[rank], layout.local_shape(rank)
    if block is None or shape is None:
        return None
    if layout.partial:
        _check_sum(whole.dtype)
        if rank not in _bearers(layout):
            nothing = torch.zeros(shape, dtype=whole.dtype, device=whole.device)
            return -nothing
    piece = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    for there, here in _copies(block):
        piece[here] = whole[there]
    return piece


def _bearers(layout: Layout) -> set[int]:
    """Under a partial sum, the ranks whose addend is the whole when the whole is taken apart."""
    least: dict[Block, int] = {}
    for rank in layout.ranks:
        block = layout.blocks[rank]
        assert block is not None  # ranks holds only such
        least[block] = min(layout.addend(rank), least.get(block, layout.addend(rank)))
    return {rank for rank in layout.ranks if layout.addend(rank) == least[layout.blocks[rank] or ()]}


def own_part(layout: Layout, rank: int) -> list[tuple[Index, Index]]:
    """Where a rank's piece lies: pairs of an index into the whole and one into the piece."""
    block = layout.blocks[rank]
    return [] if block is None else list(_copies(block))


def _copies(block: Block) -> Iterator[tuple[Index, Index]]:
    """Pairs of a global and a local index that cover the block."""
    per_dim = [list(_placed(spans)) for spans in block]
    for combination in itertools.product(*per_dim):
        yield tuple(there for there, _ in combination), tuple(here for _, here in combination)


def _placed(spans: tuple[Span, ...]) -> Iterator[tuple[slice, slice]]:
    at = 0
    for start, stop in spans:
        yield slice(start, stop), slice(at, at + stop - start)
        at += stop - start


@lru_cache(maxsize=1024)
def _in_a_row(blocks: tuple[Block, ...]) -> tuple[int, list[int]] | None:
    """The one dim along which blocks lie beside each other, and in which order: one copy joins them."""
    if len(blocks) < 2 or any(len(spans) != 1 for block in blocks for spans in block):
        return None
    differing = [dim for dim, spans in enumerate(zip(*blocks, strict=True)) if len(set(spans)) > 1]
    if len(differing) != 1:
        return None
    dim = differing[0]
    return dim, sorted(range(len(blocks)), key=lambda at: blocks[at][dim][0])


@lru_cache(maxsize=1024)
def _check_cover(shape: tuple[int, ...], blocks: frozenset[Block]) -> None:
    """Raise :class:`LayoutError` unless the blocks hold every element once."""
    covered, numel = sum(_volume(block) for block in blocks), math.prod(shape)
    if covered != numel:
        msg = f"the pieces hold {covered} of {numel} elements"
        raise LayoutError(msg)
    for block in blocks:
        if any(
            span != piece for spans, n in zip(block, shape, strict=True) for span, piece in _clipped(spans, n)
        ):
            msg = f"a piece reaches outside the shape {shape}"
            raise LayoutError(msg)
    for one, other in itertools.combinations_with_replacement(blocks, 2):
        if _volume(one) and _volume(other) and _overlap(one, other):
            msg = f"the pieces {one} and {other} overlap, so others are missing"
            raise LayoutError(msg)


def _clipped(spans: tuple[Span, ...], n: int) -> list[tuple[Span, Span]]:
    return [((start, stop), (max(start, 0), min(stop, n))) for start, stop in spans]


def _overlap(one: Block, other: Block) -> bool:
    """Whether two blocks share an element; for a block and itself, whether it holds one twice."""
    if one == other:
        return any(_meet(a, b) for spans in one for a, b in itertools.combinations(spans, 2))
    return all(any(_meet(a, b) for a in mine for b in its) for mine, its in zip(one, other, strict=True))


def _meet(one: Span, other: Span) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


def _volume(block: Block) -> int:
    volume = 1
    for spans in block:
        volume *= sum(stop - start for start, stop in spans)
    return volume


@dataclass(frozen=True)
class Read:
    """One local slice to fetch from ``rank`` and where it belongs in the result."""

    rank: int
    local: Index
    result: Index


def plan_read(layout: Layout, window: tuple[Span, ...], ranks: tuple[int, ...] | None = None) -> list[Read]:
    """The local slices that cover a window of the whole (one span per dim), and nothing else.

    ``ranks``: which ranks to ask, by default one of each set of replicas.
    """
    out = []
    for rank in layout.owners() if ranks is None else ranks:
        block = layout.blocks[rank]
        if block is None:
            continue
        per_dim = [list(_overlaps(spans, want)) for spans, want in zip(block, window, strict=True)]
        out += [
            Read(rank, tuple(here for here, _ in part), tuple(to for _, to in part))
            for part in itertools.product(*per_dim)
        ]
    return out


def _overlaps(spans: tuple[Span, ...], want: Span) -> Iterator[tuple[slice, slice]]:
    at = 0
    for start, stop in spans:
        low, high = max(start, want[0]), min(stop, want[1])
        if low < high:
            yield slice(at + low - start, at + high - start), slice(low - want[0], high - want[0])
        at += stop - start


def normalise(index: object, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Basic indexing (ints, slices, ``...``) spelled out with one entry per dim.

    Raises :class:`InputError` for anything else and for an int outside its dim.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(not (isinstance(p, (int, slice)) or p is Ellipsis) or isinstance(p, bool) for p in parts):
        msg = "Index with ints, slices and ..., e.g. a[0, -1, :10]; for more, take a.numpy() first."
        raise InputError(msg)
    if parts.count(Ellipsis) > 1 or len(parts) - parts.count(Ellipsis) > len(shape):
        msg = f"{len(parts)} indices for an activation of {len(shape)} dims"
        raise InputError(msg)
    at = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    rest = [p for p in parts if p is not Ellipsis]
    full = rest[:at] + [slice(None)] * (len(shape) - len(rest)) + rest[at:]
    return tuple(_one(part, dim, n) for dim, (part, n) in enumerate(zip(full, shape, strict=True)))


def _one(part: int | slice, dim: int, n: int) -> int | slice:
    if isinstance(part, slice):
        return part
    if not -n <= part < n:
        msg = f"index {part} is outside dim {dim}, which has {n} entries"
        raise InputError(msg)
    return part % n


def window_of(
    index: tuple[int | slice, ...], shape: tuple[int, ...]
) -> tuple[tuple[Span, ...], tuple[int | slice, ...]]:
    """The smallest step-1 window that holds an index, and the index to apply to that window."""
    window: list[Span] = []
    rest: list[int | slice] = []
    for part, n in zip(index, shape, strict=True):
        if isinstance(part, int):
            window.append((part, part + 1))
            rest.append(0)
            continue
        picked = range(*part.indices(n))
        if not picked:
            window.append((0, 0))
            rest.append(slice(None))
            continue
        low, high = min(picked[0], picked[-1]), max(picked[0], picked[-1]) + 1
        window.append((low, high))
        rest.append(slice(None) if picked.step == 1 else slice(None, None, picked.step))
    return tuple(window), tuple(rest)
