"""The weights that a rank holds in parts, and where in the whole ones these parts stand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from flexmagic.engine.checkpoint import Checkpoint, Place, Unsharded, spans_in, stands_at
from flexmagic.layout.layout import Span


@dataclass(frozen=True)
class LocalWeight:
    """A rank's part of one split weight while a forward uses it, along one dim of it.

    ``place``: the number of the part as a DTensor says it, ``None`` for a plain tensor.
    """

    name: str
    dim: int
    size: int
    whole: int
    place: int | None


def local_weights(name: str, parameter: torch.Tensor, whole: tuple[int, ...] | None) -> Iterator[LocalWeight]:
    """The dims along which a rank holds only a part of a parameter.

    ``whole``: the parameter's shape in the unsharded model, where that is known.
    """
    local, full = parameter.shape, whole
    if isinstance(parameter, DTensor):
        local, full = parameter.to_local().shape, tuple(parameter.shape)
    for dim, (size, length) in enumerate(zip(local, full or local, strict=False)):
        if size != length:
            yield LocalWeight(name, dim, size, length, _place(parameter, dim))


def _place(parameter: torch.Tensor, dim: int) -> int | None:
    if not isinstance(parameter, DTensor):
        return None
    place, coordinate = 0, parameter.device_mesh.get_coordinate()
    assert coordinate is not None  # this rank holds a part of it
    for axis, placement in enumerate(parameter.placements):
        if placement.is_shard(dim):
            if type(placement) is not Shard:
                return None
            place = place * parameter.device_mesh.size(axis) + coordinate[axis]
        elif placement.is_partial():
            return None
    return place


@dataclass(frozen=True)
class Found:
    """A rank's part of a weight, the global spans it covers, and why they are not known if they are not."""

    weight: LocalWeight
    spans: tuple[Span, ...] | None = None
    why: str = ""


def find(
    weights: Iterable[LocalWeight], parameters: Mapping[str, torch.Tensor], wholes: Checkpoint | Unsharded
) -> list[Found]:
    """Look up every plain part of the weights of one module.

    A part that could stand in several places, as that of a bias of zeros, stands where another
    weight of its module does, if what is there is the same.
    """
    first = [_find(weight, parameters, wholes) for weight in weights]
    return [_beside(found, first, parameters, wholes) for found in first]


def _find(
    weight: LocalWeight, parameters: Mapping[str, torch.Tensor], wholes: Checkpoint | Unsharded
) -> Found:
    parameter, whole = parameters.get(weight.name), wholes.shape(weight.name)
    if weight.place is not None or parameter is None or whole is None or whole[weight.dim] != weight.whole:
        return Found(weight)
    local = parameter.detach()
    others = [n for dim, n in enumerate(local.shape) if dim != weight.dim]
    if local.is_meta or others != [n for dim, n in enumerate(whole) if dim != weight.dim]:
        return Found(weight)
    at = spans_in(local, wholes.tensor(weight.name), weight.dim)
    if isinstance(at, Place):
        return Found(weight, None, at.value.format(name=weight.name, whole=wholes.called))
    return Found(weight, at)


def _beside(
    found: Found,
    others: Sequence[Found],
    parameters: Mapping[str, torch.Tensor],
    wholes: Checkpoint | Unsharded,
) -> Found:
    if not found.why:
        return found
    name, dim, length = found.weight.name, found.weight.dim, found.weight.whole
    near = {other.spans for other in others if other.spans is not None and other.weight.whole == length}
    local, whole = parameters[name].detach(), wholes.tensor(name)
    fitting = [spans for spans in near if stands_at(local, whole, dim, spans)]
    return replace(found, spans=fitting[0], why="") if len(fitting) == 1 else found
