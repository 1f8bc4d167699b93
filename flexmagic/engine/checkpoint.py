"""Which rows or columns of a weight a rank holds, found by looking the rank's part up in the checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flexmagic.layout.layout import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Checkpoint:
    """The safetensors files of a model on disk; nothing is read before it is asked for."""

    def __init__(self, folder: str | Path | None) -> None:
        self._files: dict[str, Path] = {}
        files = sorted(Path(folder).glob("*.safetensors")) if folder and Path(folder).is_dir() else []
        for file in files:
            from safetensors import safe_open

            with safe_open(file, "pt") as opened:
                self._files.update(dict.fromkeys(opened.keys(), file))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A tensor's shape, ``None`` if the checkpoint has no such name."""
        if name not in self._files:
            return None
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU."""
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as opened:
            found: Any = opened.get_tensor(name)
        return torch.as_tensor(found)


class Unsharded:
    """The weights of the undistributed model that a user's cell can make; made when first asked for."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make

    @functools.cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            return {name: parameter.detach() for name, parameter in self._make().named_parameters()}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """A parameter's shape, ``None`` if there is none of that name."""
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def tensor(self, name: str) -> torch.Tensor:
        """A whole parameter."""
        return self._tensors[name]


def spans_in(part: torch.Tensor, whole: torch.Tensor, dim: int) -> tuple[Span, ...] | None:
    """The global spans along ``dim`` that a rank's part of a weight covers, in the order it holds them.

    ``None`` if some slice of it is not in the whole, or stands there more than once.
    """
    mine = _rows(part, dim)
    keys: dict[bytes, int] = {}
    repeated: set[bytes] = set()
    for at, row in enumerate(_rows(whole.to(part.dtype), dim)):
        repeated |= {row} & keys.keys()
        keys[row] = at
    if any(row not in keys or row in repeated for row in mine):
        return None
    return merged([keys[row] for row in mine])


def _rows(tensor: torch.Tensor, dim: int) -> list[bytes]:
    flat = tensor.detach().cpu().movedim(dim, 0).reshape(tensor.shape[dim], -1).contiguous()
    return [bytes(row) for row in flat.view(torch.uint8).numpy()]


def merged(indices: Sequence[int]) -> tuple[Span, ...]:
    """Indices in order as spans: ``[4, 5, 6, 0]`` is ``((4, 7), (0, 1))``."""
    out: list[Span] = []
    for at in indices:
        if out and out[-1][1] == at:
            out[-1] = (out[-1][0], at + 1)
        else:
            out.append((at, at + 1))
    return tuple(out)
