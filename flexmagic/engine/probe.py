"""Looking at every site of a model during one forward, and what a rank notes there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flexmagic.engine.tensors import dtype_name, leaves, local_of
from flexmagic.layout.sites import Site
from flexmagic.layout.survey import Seen

_PROJECTIONS = 4
_CHUNK = 1 << 20

Look = Callable[[Site, torch.Tensor], None]


def observe(model: nn.Module, inputs: Mapping[str, Any], look: Look) -> None:
    """Run one forward without gradients and show every tensor at every site to ``look``.

    A module called more than once is shown once per call.
    """

    def before(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            for value in (args, kwargs):
                for where, tensor in leaves(value):
                    look(Site(path, "input", where), tensor)

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            for where, tensor in leaves(output):
                look(Site(path, "output", where), tensor)

        return hook

    handles = []
    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
            handles.append(module.register_forward_hook(after(path)))
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()


class Notes:
    """What one rank sees in the probe: a :class:`Seen` per site, and which tensors get overwritten."""

    def __init__(self) -> None:
        self.seen: dict[Site, Seen] = {}
        self._tensors: dict[Site, tuple[torch.Tensor, int]] = {}

    def __call__(self, site: Site, tensor: torch.Tensor) -> None:
        """Note a site's tensor; the first call of a module counts."""
        if site in self.seen:
            return
        local = local_of(tensor).detach()
        self.seen[site] = note(local, tensor)
        self._tensors[site] = (local, local._version)  # noqa: SLF001 - torch's documented counter

    def overwritten(self) -> set[Site]:
        """The sites whose tensor the model wrote into after it was shown."""
        return {
            site
            for site, (tensor, version) in self._tensors.items()
            if tensor._version != version  # noqa: SLF001
        }


def note(local: torch.Tensor, original: torch.Tensor) -> Seen:
    """Shape, dtype, fingerprint and norm of a local tensor, and what a DTensor says of itself."""
    flat = local.reshape(-1)
    values = (
        torch.nan_to_num(flat.to(torch.float64), nan=-1e4, posinf=1e4, neginf=-2e4)
        if not flat.is_complex()
        else (torch.view_as_real(flat).reshape(-1).to(torch.float64))
    )
    return Seen(
        shape=tuple(local.shape),
        dtype=dtype_name(local.dtype),
        fingerprint=tuple(_project(values.cpu())),
        norm=float(values.norm()),
        constant=bool((values == values[:1]).all()),
        placements=tuple(original.placements) if isinstance(original, DTensor) else None,
        whole=tuple(original.shape) if isinstance(original, DTensor) else None,
    )


def _project(values: torch.Tensor) -> list[float]:
    """Projections of a flat float64 tensor on fixed random vectors, in chunks to bound memory."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(_PROJECTIONS, dtype=torch.float64)
    for start in range(0, values.numel(), _CHUNK):
        chunk = values[start : start + _CHUNK]
        random = torch.randn(chunk.numel(), _PROJECTIONS, generator=generator, dtype=torch.float64)
        total += chunk @ random
    return [float(x) for x in total]
