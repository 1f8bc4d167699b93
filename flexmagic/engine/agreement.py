"""What all ranks have to agree on, so that none waits for another in vain."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flexmagic.engine.exchange import RunStopped
from flexmagic.engine.groups import Groups
from flexmagic.engine.tensors import as_bytes
from flexmagic.engine.tree import kind_of, modules_of
from flexmagic.errors import InputError


def agree(groups: Groups, arguments: Mapping[str, Any], *, stale: bool) -> bool:
    """Whether any rank's model has changed since its survey; all ranks must call it.

    Raises :class:`InputError` on all ranks alike if they were given different inputs.
    """
    everyone = numbers_of_all(groups, [int(stale), _digest(arguments)])
    digests = [digest for _, digest in everyone]
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        ranks = ", ".join(map(str, odd))
        msg = f"Rank {ranks} was given another input than rank 0. Each run has one input, the same for all."
        raise InputError(msg)
    return any(bool(said[0]) for said in everyone)


def numbers_of_all(groups: Groups, mine: list[int]) -> list[list[int]]:
    """A few numbers of every rank, in rank order; all ranks must call it."""
    if groups.place.world_size == 1:
        return [list(mine)]
    numbers = torch.tensor(mine, dtype=torch.int64)
    out = [torch.empty_like(numbers) for _ in range(groups.place.world_size)]
    dist.all_gather(out, numbers, group=groups.own)
    return [[int(n) for n in of_rank] for of_rank in out]


def same_request(groups: Groups, what: str, *, well: bool, values: int = 0) -> None:
    """Go on only if all ranks are well and ask for the same, with the same values; all must call it.

    ``values``: a number made from them. Raises :class:`RunStopped` on all ranks alike.
    """
    said = numbers_of_all(groups, [int(well), zlib.crc32(what.encode()), values])
    if not all(ok for ok, _, _ in said):
        raise RunStopped
    same = "Do not branch on `rank`, nor on what else differs between ranks"
    if len({digest for _, digest, _ in said}) > 1:
        asked: list[Any] = [None] * groups.place.world_size
        dist.all_gather_object(asked, what, group=groups.own)
        listed = ", ".join(f"on rank {rank} for {each}" for rank, each in enumerate(asked))
        raise RunStopped(f"the trace asks for different sites: {listed}. {same}")
    if len({digest for _, _, digest in said}) > 1:
        raise RunStopped(f"the trace gave {what} different values on the ranks. {same}")


def _digest(arguments: Mapping[str, Any]) -> int:
    digest = 0
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            digest = zlib.crc32(f"{name}{value.dtype}{tuple(value.shape)}".encode(), digest)
            digest = zlib.crc32(as_bytes(value.detach().cpu().contiguous()).numpy().data, digest)
        else:
            digest = zlib.crc32(f"{name}{type(value).__name__}".encode(), digest)
    return digest


def form_of(model: nn.Module) -> tuple[object, ...]:
    """What changes with the modules, their parameters' shapes and the kind of attention."""
    parts: list[object] = []
    for path, module in modules_of(model).items():
        parts += [path, kind_of(module)]
        own = module._parameters.values()  # noqa: SLF001 - the public way takes most of the time of all this
        parts += [parameter.shape for parameter in own if parameter is not None]
        if (config := module.__dict__.get("config")) is not None:
            parts.append(str(getattr(config, "_attn_implementation", "")))
    return tuple(parts)


def form_of_input(arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """Names, dtypes and shapes, but for the number of rows."""
    return tuple(
        (name, str(value.dtype), tuple(value.shape[1:])) if isinstance(value, torch.Tensor) else (name,)
        for name, value in arguments.items()
    )
