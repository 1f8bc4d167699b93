"""Low-rank adapters (LoRA, arXiv 2106.09685): ``output + scale · (input Aᵀ) Bᵀ`` beside frozen modules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn


class LowRank(nn.Module):
    """One pair of small matrices for each of several modules, kept beside them.

    ``sizes``: by module path, the widths of its input and output. ``down.<path>`` is ``[rank, in]``,
    ``up.<path>`` is ``[out, rank]`` and starts at zero, so that nothing changes before training. A
    path's dots are slashes in these names.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]], rank: int, scale: float) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        for path, (width_in, width_out) in sizes.items():
            down = torch.empty(rank, width_in)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.down[_key(path)] = nn.Parameter(down)
            self.up[_key(path)] = nn.Parameter(torch.zeros(width_out, rank))
        self._inputs: dict[str, torch.Tensor] = {}

    def see(self, site: str, x: torch.Tensor) -> None:
        """Note the whole input ``[..., in]`` of a module until its output comes."""
        self._inputs[_path(site)] = x

    def forward(self, site: str, output: torch.Tensor) -> torch.Tensor:
        """The module's whole output ``[..., out]`` with the adapter's part added."""
        path = _path(site)
        x = self._inputs.pop(path)
        down, up = self.down[_key(path)].to(x.dtype), self.up[_key(path)].to(x.dtype)
        return output + self.scale * (x @ down.T) @ up.T


def _path(site: str) -> str:
    return site.partition(":")[0]


def _key(path: str) -> str:
    return path.replace(".", "/")
