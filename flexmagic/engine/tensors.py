"""Plain tensors out of what hooks see: nested values, DTensors, asynchronous results."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

_STEP = re.compile(r"\[(\d+)\]|\.(\w+)")
_COLUMNS = 127
"""A prime, so that rows of a tensor that change places change the columns' sums."""


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors inside nested tuples, lists, mappings and dataclasses, with the way to each.

    Other objects (caches, configurations, ``None``) are passed over.
    """
    if isinstance(value, torch.Tensor):
        yield where, value
    elif isinstance(value, (tuple, list)):
        for at, item in enumerate(value):
            yield from leaves(item, f"{where}[{at}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str) and key.isidentifier():
                yield from leaves(item, f"{where}.{key}")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name, None), f"{where}.{field.name}")


def replace_leaf(value: Any, where: str, new: torch.Tensor | None) -> Any:
    """The nested value with one tensor replaced; everything else is shared, nothing is changed."""
    match = _STEP.match(where)
    if match is None:
        return new
    rest = where[match.end() :]
    if match[1] is not None:
        at = int(match[1])
        items = list(value)
        items[at] = replace_leaf(items[at], rest, new)
        if isinstance(value, tuple):
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return items
    changed = copy.copy(value)
    if isinstance(value, Mapping):
        changed[match[2]] = replace_leaf(value[match[2]], rest, new)
    else:  # also a frozen dataclass: the copy is not yet anyone's
        object.__setattr__(changed, match[2], replace_leaf(getattr(value, match[2]), rest, new))
    return changed


def hollow(value: Any) -> Any:
    """A nested value with ``None`` for its tensors and for whatever else might hold some, as caches do."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(hollow, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(hollow, value))
    if isinstance(value, MutableMapping):
        out = copy.copy(value)
        for key in value:
            out[key] = hollow(value[key])
        return out
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for where, _ in list(leaves(value)):
            value = replace_leaf(value, where, None)
        return value
    return value if isinstance(value, (bool, int, float, str)) else None


def detached(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values without the graphs that their tensors are part of."""
    out = dict(values)
    for name, value in values.items():
        for where, tensor in list(leaves(value)):
            if tensor.requires_grad:
                out[name] = replace_leaf(out[name], where, tensor.detach())
    return out


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The plain local tensor behind a DTensor or an asynchronous collective's result."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    wait: Callable[[], torch.Tensor] | None = getattr(tensor, "wait", None)
    return tensor if wait is None else wait()


def like_original(piece: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """A new local piece in the form the model handed out: a DTensor again where it was one."""
    if not isinstance(original, DTensor):
        return piece
    return DTensor.from_local(
        piece,
        original.device_mesh,
        original.placements,
        run_check=False,
        shape=original.shape,
        stride=original.stride(),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def check_result(result: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Raise :class:`TypeError` or :class:`ValueError` for what cannot replace a tensor like this."""
    if not isinstance(result, torch.Tensor):
        what = "None" if result is None else type(result).__name__
        msg = f"{what} was left in x, not a tensor: return the new tensor, or change x and return nothing"
        raise TypeError(msg)
    if result.shape != shape or result.dtype != dtype:
        now = _kind(result.shape, result.dtype)
        msg = f"x changed from {_kind(shape, dtype)} to {now}; shape and dtype must stay"
        raise ValueError(msg)
    if result.device != device:
        msg = f"x moved from {device} to {result.device}; it must stay on its device"
        raise ValueError(msg)


def _kind(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)}{list(shape)}"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as a flat uint8 view; the tensor must be contiguous."""
    return tensor.reshape(-1).view(torch.uint8)


def checksum(tensor: torch.Tensor) -> tuple[int, int]:
    """Two exact sums over the tensor's bits: equal tensors give equal sums on every rank."""
    flat = as_bytes(tensor.detach().contiguous())
    if flat.numel() % 8 == 0:
        flat = flat.view(torch.int64)
    if flat.numel() < _COLUMNS * _COLUMNS:
        return int(flat.sum(dtype=torch.int64)), int(flat[::3].sum(dtype=torch.int64))
    left = flat.numel() % _COLUMNS  # what is long is read once only: the second sum is of the columns' sums
    sums = flat[: flat.numel() - left].view(-1, _COLUMNS).sum(0, dtype=torch.int64)
    sums[:left] += flat[flat.numel() - left :]
    weights = torch.arange(1, 2 * _COLUMNS, 2, device=sums.device)
    return int(sums.sum()), int((sums * weights).sum())


def together(contexts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors that all of some mappings have under one name in one form, as one; and the rest of each.

    Many small tensors take long to send.
    """
    stacked = {}
    for name in contexts[0] if contexts else ():
        values = [context.get(name) for context in contexts]
        found = [value for value in values if type(value) is torch.Tensor]
        if len(found) == len(contexts) and len({_form(value) for value in found}) == 1:
            stacked[name] = torch.stack(found)
    return stacked, [{n: v for n, v in context.items() if n not in stacked} for context in contexts]


def apart(stacked: Mapping[str, torch.Tensor], rest: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mappings again, of which :func:`together` made one."""
    return [{**{n: v[at] for n, v in stacked.items()}, **context} for at, context in enumerate(rest)]


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad
