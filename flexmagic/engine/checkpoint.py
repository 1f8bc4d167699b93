"""Which rows or columns of a weight a rank holds, found by looking the rank's part up in the checkpoint."""

from __future__ import annotations

import enum
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flexmagic.layout.layout import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Checkpoint:
    """The safetensors files of a model on disk; nothing is read before it is asked for.

    ``source``: their folder, or the id of a model of which the hub's cache has them.
    """

    called = "the checkpoint"

    def __init__(self, source: str | Path | None) -> None:
        self._files: dict[str, Path] = {}
        folder = _folder(source) if source else None
        files = sorted(folder.glob("*.safetensors")) if folder is not None else []
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


def _folder(source: str | Path) -> Path | None:
    """Where a model's files are on this machine, ``None`` if they are not."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


class Unsharded:
    """The weights of the undistributed model that a user's cell can make; made when first asked for."""

    called = "the unsharded form"

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


class Place(enum.Enum):
    """Why a part of a weight has no place in the whole."""

    ABSENT = "holds values of {name} that {whole} does not have"
    TWICE = "holds values of {name} that stand more than once in {whole}"


def spans_in(part: torch.Tensor, whole: torch.Tensor, dim: int) -> tuple[Span, ...] | Place:
    """The global spans along ``dim`` that a rank's part of a weight covers, in the order it holds them.

    What tells that it has no such place: some slice of it is not in the whole, or stands there more
    than once.
    """
    mine = _rows(part, dim)
    keys: dict[bytes, int] = {}
    repeated: set[bytes] = set()
    for at, row in enumerate(_rows(whole.to(part.dtype), dim)):
        repeated |= {row} & keys.keys()
        keys[row] = at
    if any(row not in keys for row in mine):
        return Place.ABSENT
    if any(row in repeated for row in mine):
        return Place.TWICE
    return merged([keys[row] for row in mine])


def stands_at(part: torch.Tensor, whole: torch.Tensor, dim: int, spans: Sequence[Span]) -> bool:
    """Whether a part of a weight is what the whole has at these spans along ``dim``, bit for bit."""
    if sum(stop - start for start, stop in spans) != part.shape[dim]:
        return False
    there = torch.cat([whole.to(part.dtype).narrow(dim, start, stop - start) for start, stop in spans], dim)
    return _rows(part, dim) == _rows(there, dim)


def _rows(tensor: torch.Tensor, dim: int) -> list[bytes]:
    own = tensor.detach().to("cpu", copy=True)  # numpy keeps what it shares from being resized, as FSDP does
    flat = own.movedim(dim, 0).reshape(tensor.shape[dim], -1).contiguous()
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
