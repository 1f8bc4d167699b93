"""Looking at every site of a model during one forward, and what a rank notes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flexmagic.engine.checkpoint import Checkpoint, Unsharded
from flexmagic.engine.tensors import dtype_name, leaves, local_of
from flexmagic.engine.tree import modules_of, unwrapped
from flexmagic.engine.weights import Found, find, local_weights
from flexmagic.layout.seen import Distributed, Seen, same
from flexmagic.layout.sites import Site

_PROJECTIONS = 4
_CHUNK = 1 << 20
_CALLS = 7
"""So many calls of a module are looked at after its first."""
_LONGEST = 64
"""Dims longer than this have no projections of their slices."""

Look = Callable[[Site, torch.Tensor], None]
Enter = Callable[[str, nn.Module], None]


def observe(model: nn.Module, call: Callable[[], Any], look: Look, enter: Enter | None = None) -> None:
    """Make one ``call`` of the model without gradients and show every tensor at every site to ``look``.

    A module called more than once is shown once per call; ``enter`` hears of every call when it
    begins, with the weights as the module is going to use them.
    """

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if enter is not None:
                enter(path, module)
            show(path, "input", args)
            show(path, "input", kwargs)

        return hook

    def after(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: show(path, "output", output)

    def show(path: str, port: str, value: Any) -> None:
        for where, tensor in leaves(value):
            look(Site(path, port, where), tensor)

    handles = []
    try:
        for path, module in modules_of(model).items():
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path)))
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            call()
    finally:
        for handle in handles:
            handle.remove()


class Notes:
    """What one rank sees in the probe: a :class:`Seen` per site, its weights, what gets overwritten.

    ``called``: for each module, which of its children it called, in order. ``whole``: the shapes of
    the unsharded model's parameters; ``wholes``: where to look up their values. ``originals``: what this
    rank had of those that were edited since.
    """

    def __init__(
        self,
        whole: Mapping[str, tuple[int, ...]],
        wholes: Checkpoint | Unsharded,
        originals: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.seen: dict[Site, Seen] = {}
        self.weights: dict[tuple[str, int], Found] = {}
        self.called: dict[str, list[str]] = {}
        self._whole, self._wholes, self._originals = whole, wholes, originals or {}
        self._tensors: dict[Site, tuple[torch.Tensor, int]] = {}

    def enter(self, path: str, module: nn.Module) -> None:
        """Note a module's own weights as it is about to use them, and that its parent called it."""
        if path:
            self.called.setdefault(path.rpartition(".")[0], []).append(path)
        own = unwrapped(module).named_parameters(recurse=False)
        named = ((f"{path}.{name}" if path else name, parameter) for name, parameter in own)
        parameters = {name: self._as_loaded(name, parameter) for name, parameter in named}
        weights = [
            weight
            for name, parameter in parameters.items()
            for weight in local_weights(name, parameter, self._whole.get(name))
            if (name, weight.dim) not in self.weights
        ]
        # now, as what shards weights at rest takes them away again after the forward
        for found in find(weights, parameters, self._wholes):
            self.weights[found.weight.name, found.weight.dim] = found

    def _as_loaded(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """A plain parameter as it was before it was edited."""
        found = self._originals.get(name)
        plain = found is not None and not isinstance(parameter, DTensor) and found.shape == parameter.shape
        return found if found is not None and plain else parameter

    def __call__(self, site: Site, tensor: torch.Tensor) -> None:
        """Note a site's tensor; of a module called often only the first few calls."""
        first = self.seen.get(site)
        if first is not None and len(first.later) == _CALLS:
            return
        local = local_of(tensor).detach()
        noted = note(local, tensor)
        if first is not None:
            self.seen[site] = replace(first, later=(*first.later, noted))
            return
        self.seen[site] = noted
        self._tensors[site] = (local, local._version)  # noqa: SLF001 - torch's documented counter

    def begins_as(self, site: Site, local: torch.Tensor, rows: int) -> bool:
        """Whether a tensor of a forward with ``rows`` rows starts with what the first row gave before.

        What was overwritten since, or does not follow the number of rows, is not asked.
        """
        first = self._tensors[site][0]
        shapes = list(zip(first.shape, local.shape, strict=False))
        grown = [dim for dim, (a, b) in enumerate(shapes) if a != b]
        if self._written(site) or first.ndim != local.ndim or len(grown) > 1:
            return True
        if grown:
            each, rest = divmod(local.shape[grown[0]], rows)
            if rest or each * (rows - 1) != first.shape[grown[0]]:
                return True
            first, local = first.narrow(grown[0], 0, each), local.narrow(grown[0], 0, each)
        return same(note(first, first), note(local, local))

    def overwritten(self) -> set[Site]:
        """The sites whose tensor the model wrote into after it was shown.

        A collective, as ``all_reduce``, writes in place and leaves the version counter as it was: the values
        themselves are compared too.
        """
        return {site for site in self._tensors if self._written(site)}

    def _written(self, site: Site) -> bool:
        tensor, version = self._tensors[site]
        if tensor._version != version:  # noqa: SLF001 - torch's documented counter
            return True
        return tuple(_project(_values(tensor))) != self.seen[site].fingerprint


def note(local: torch.Tensor, original: torch.Tensor) -> Seen:
    """Shape, dtype, projections and norm of a local tensor, and what a DTensor says of itself."""
    values = _values(local)
    return Seen(
        shape=tuple(local.shape),
        dtype=dtype_name(local.dtype),
        fingerprint=tuple(_project(values)),
        norm=float(values.norm()),
        constant=bool((values == values[:1]).all()),
        slices=() if local.is_complex() else tuple(_slices(values.view(local.shape))),
        by_rows=_by_rows(local),
        distributed=says(original),
    )


def _values(local: torch.Tensor) -> torch.Tensor:
    """All values, flat, in float64, those that are none as numbers that are rare."""
    flat = local.reshape(-1)
    if flat.is_complex():
        return torch.view_as_real(flat).reshape(-1).to(torch.float64).cpu()
    return torch.nan_to_num(flat.to(torch.float64), nan=-1e4, posinf=1e4, neginf=-2e4).cpu()


def says(tensor: torch.Tensor) -> Distributed | None:
    """What a DTensor says of itself on this rank; ``None`` for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None  # this rank is shown it
    return Distributed(
        tuple(tensor.placements), tuple(tensor.shape), tuple(mesh.shape), tuple(coordinate),
        tuple(int(rank) for rank in mesh.mesh.flatten()),
    )  # fmt: skip


def _slices(values: torch.Tensor) -> Iterator[tuple[tuple[float, ...], ...]]:
    """Per dim, projections ``[length, 2]`` of each slice along it; nothing for long dims."""
    for dim, length in enumerate(values.shape):
        if length > _LONGEST or values.numel() > _CHUNK:
            yield ()
            continue
        rows = values.movedim(dim, 0).reshape(length, values.numel() // max(length, 1))
        generator = torch.Generator().manual_seed(1)
        random = torch.randn(rows.shape[1], 2, generator=generator, dtype=torch.float64)
        yield tuple((float(a), float(b)) for a, b in rows @ random)


def _by_rows(local: torch.Tensor) -> bool:
    """Whether the tensor's first half along dim 0 is the same as the second."""
    if local.ndim == 0 or local.shape[0] % 2:
        return False
    if not local.numel():
        return True
    first, second = local.chunk(2)
    if not local.is_floating_point():
        return bool(torch.equal(first, second))
    return torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-5, equal_nan=True)


def _project(values: torch.Tensor) -> list[float]:
    """Projections of a flat float64 tensor on fixed random vectors, in chunks to bound memory."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(_PROJECTIONS, dtype=torch.float64)
    for start in range(0, values.numel(), _CHUNK):
        chunk = values[start : start + _CHUNK]
        random = torch.randn(chunk.numel(), _PROJECTIONS, generator=generator, dtype=torch.float64)
        total += chunk @ random
    return [float(x) for x in total]
