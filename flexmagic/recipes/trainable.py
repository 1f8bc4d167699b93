"""Modules that recipes train in hooks; the engines import them, so they know torch alone."""

from __future__ import annotations

import torch
from torch import nn


class Translators(nn.Module):
    """One affine map for each layer, ``h + h Wᵀ + b``; all are the identity before training.

    ``weights.<layer>``: ``[width, width]``, ``biases.<layer>``: ``[width]``. Source: Belrose et al. 2023
    (arXiv 2303.08112).
    """

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(width, width) for _ in range(layers))
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(layers))

    def forward(self, h: torch.Tensor, layer: int) -> torch.Tensor:
        """The residual stream ``[..., width]`` after a layer as that of the last one; that itself stays."""
        if layer == len(self.weights):
            return h
        weight, bias = self.weights[layer].to(h.dtype), self.biases[layer].to(h.dtype)
        return h + nn.functional.linear(h, weight, bias)


class Subspace(nn.Module):
    """A rotated subspace, in which values of a source take the place of the base's.

    ``weight``: ``[width, size]``, made orthonormal in each call. ``boundless``: ``size`` is ``width``, and
    ``boundary``, a share of it between 0 and 1, says how many of its dims are taken. Source: Geiger et al.
    2023 (arXiv 2303.02536), Wu et al. 2023 (2305.08809).
    """

    def __init__(self, width: int, size: int, *, boundless: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, size) / width**0.5)
        self.boundary = nn.Parameter(torch.tensor(0.5)) if boundless else None

    def basis(self) -> torch.Tensor:
        """An orthonormal basis of the subspace, ``[width, size]``."""
        return torch.linalg.qr(self.weight).Q

    def mask(self, temperature: float) -> torch.Tensor:
        """How much of each of its dims is taken, ``[size]``: soft at the boundary, where there is one."""
        size = self.weight.shape[1]
        if self.boundary is None:
            return torch.ones_like(self.weight[0])
        places = torch.arange(size, device=self.weight.device, dtype=self.weight.dtype) + 0.5
        return torch.sigmoid((self.boundary * size - places) / temperature)

    def forward(self, base: torch.Tensor, source: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """``base [..., width]`` with what ``source`` has in the subspace."""
        basis = self.basis()
        taken = ((source - base).to(basis.dtype) @ basis) * self.mask(temperature) @ basis.T
        return base + taken.to(base.dtype)
