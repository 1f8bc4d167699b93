"""How a parameter's parts join: as DTensors say it, or not at all where plain parts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexmagic.errors import LayoutError
from flexmagic.layout.decide import Decision, from_distributed
from flexmagic.layout.dims import Dim
from flexmagic.layout.layout import Block, Layout, Span
from flexmagic.layout.mesh import DATA_AXES, Mesh
from flexmagic.layout.seen import Seen, WeightSplit, same
from flexmagic.layout.sites import Site


def parameter_layout(
    mesh: Mesh,
    name: str,
    parts: Mapping[int, Seen],
    whole: tuple[int, ...] | None = None,
    held: Sequence[WeightSplit] = (),
) -> Layout:
    """The layout of a parameter from each rank's part of it.

    ``whole``: its shape in the unsharded model, where that is known; ``held``: along which dims,
    and where, ranks hold plain parts of it, as the survey found. Raises :class:`LayoutError` if
    the parts do not say how they join, or may be less than the whole.
    """
    first = next(iter(parts.values()))
    if len({part.distributed is None for part in parts.values()}) > 1:
        msg = f"Some ranks hold {name} as a DTensor and others as a plain tensor."
        raise LayoutError(msg)
    if first.distributed is None:
        return _in_parts(mesh, parts, whole, held) or _of_plain(mesh, name, parts, whole, held)
    told = first.distributed.whole
    if whole is not None and told != whole:
        joined = _parts_in_pieces(mesh, name, parts, whole, held)
        if joined is None:
            msg = (
                f"The ranks hold DTensors of {told} of {name}, which is {whole}, and do not say how they join"
            )
            msg += next((f": {split.why}" for split in held if split.why), "") + "."
            raise LayoutError(msg)
        return joined
    return _of_distributed(mesh, name, parts)


def _of_distributed(mesh: Mesh, name: str, parts: Mapping[int, Seen]) -> Layout:
    """The layout of DTensors of one mesh, or of several that hold the same."""
    first = next(iter(parts.values()))
    dims = tuple(Dim(f"dim{at}") for at in range(len(first.shape)))
    found = from_distributed(Decision(tuple(parts), dims, first.dtype), parts)
    if found.refused:
        msg = f"{name}: {found.refused}"
        raise LayoutError(msg)
    rule = found.rule(Site(name, "weight"), mesh)
    return rule.local_layout([parts[rank].shape if rank in parts else None for rank in range(mesh.size)])


def _parts_in_pieces(
    mesh: Mesh, name: str, parts: Mapping[int, Seen], whole: tuple[int, ...], held: Sequence[WeightSplit]
) -> Layout | None:
    """The layout of plain parts, whose places are known, that are sharded once more; ``None`` for others."""
    if len(held) != 1:
        return None
    (split,) = held
    blocks: list[Block | None] = [None] * mesh.size
    for ranks in {part.distributed.ranks for part in parts.values() if part.distributed is not None}:
        here = {rank: parts[rank] for rank in ranks if rank in parts}
        places = {split.spans[rank] for rank in here}
        spans = next(iter(places))
        inner = _of_distributed(mesh, name, here)
        length = sum(stop - start for start, stop in spans or ())
        if (
            not spans
            or len(places) > 1
            or inner.shape != (*whole[: split.dim], length, *whole[split.dim + 1 :])
        ):
            return None
        for rank in here:
            block = inner.blocks[rank]
            assert block is not None  # every one of these ranks holds a piece
            there = tuple(_window(spans, window) for window in block[split.dim])
            blocks[rank] = (*block[: split.dim], sum(there, ()), *block[split.dim + 1 :])
    names = tuple(f"dim{at}" for at in range(len(whole)))
    return Layout(whole, names, next(iter(parts.values())).dtype, mesh, tuple(blocks))


def _window(spans: Sequence[Span], window: Span) -> tuple[Span, ...]:
    """The global spans of a stretch of a part that has these spans."""
    out, at = [], 0
    for start, stop in spans:
        low, high = max(at, window[0]), min(at + stop - start, window[1])
        if low < high:
            out.append((start + low - at, start + high - at))
        at += stop - start
    return tuple(out)


def _in_parts(
    mesh: Mesh, parts: Mapping[int, Seen], whole: tuple[int, ...] | None, held: Sequence[WeightSplit]
) -> Layout | None:
    """The layout of plain parts whose places along one dim are all known; ``None`` for any other."""
    if whole is None or len(held) != 1:
        return None
    (split,) = held
    blocks: list[Block | None] = [None] * mesh.size
    for rank, part in parts.items():
        spans = split.spans[rank]
        shape = (*whole[: split.dim], sum(b - a for a, b in spans or ()), *whole[split.dim + 1 :])
        if not spans or part.shape != shape:
            return None
        block = [((0, n),) for n in whole]
        blocks[rank] = (*block[: split.dim], spans, *block[split.dim + 1 :])
    names = tuple(f"dim{at}" for at in range(len(whole)))
    return Layout(whole, names, next(iter(parts.values())).dtype, mesh, tuple(blocks))


def _of_plain(
    mesh: Mesh,
    name: str,
    parts: Mapping[int, Seen],
    whole: tuple[int, ...] | None,
    held: Sequence[WeightSplit],
) -> Layout:
    """The layout of plain tensors: they are the whole if all are the same and nothing is missing."""
    first = next(iter(parts.values()))
    why = next((f": {split.why}" for split in held if split.why), "")
    if any(part.dtype != first.dtype or not same(first, part) for part in parts.values()):
        msg = f"The ranks hold different values of {name} and do not say how they join{why}."
        raise LayoutError(msg)
    if whole is not None and first.shape != whole:
        msg = f"The ranks hold {first.shape} of {name}, which is {whole}, and do not say how they join{why}."
        raise LayoutError(msg)
    data_only = all(n == 1 or axis in DATA_AXES for axis, n in zip(mesh.axes, mesh.shape, strict=True))
    if whole is None and first.constant and len(parts) > 1 and not data_only:
        msg = f"All elements of {name} are equal on every rank, so a piece cannot be told from the whole."
        raise LayoutError(msg)
    blocks = tuple(
        tuple(((0, n),) for n in first.shape) if rank in parts else None for rank in range(mesh.size)
    )
    names = tuple(f"dim{at}" for at in range(len(first.shape)))
    return Layout(first.shape, names, first.dtype, mesh, blocks)
