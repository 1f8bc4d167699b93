"""Heads inside a projection's features: a view ``[..., heads, head_dim]`` of a whole ``[..., features]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexmagic.errors import LayoutError
from flexmagic.layout.layout import Block, Layout, Span


@dataclass(frozen=True)
class Heads:
    """Where each head begins in the last dim, and how many features it has."""

    starts: tuple[int, ...]
    width: int

    @classmethod
    def evenly(cls, count: int, width: int, first: int = 0, stride: int | None = None) -> Heads:
        """Heads one after the other, or ``stride`` features apart."""
        return cls(tuple(first + at * (stride or width) for at in range(count)), width)

    @property
    def columns(self) -> tuple[int, ...]:
        """All features of all heads, in their order."""
        return tuple(start + at for start in self.starts for at in range(self.width))

    def _columns(self, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.columns, device=device)

    def spans(self) -> tuple[Span, ...]:
        """The features that they are, ascending."""
        return _joined(sorted((start, start + self.width) for start in self.starts))

    def packed(self) -> Heads:
        """The same heads where no features but theirs are left."""
        order = {start: at for at, start in enumerate(sorted(self.starts))}
        return Heads(tuple(order[start] * self.width for start in self.starts), self.width)

    @property
    def step(self) -> int | None:
        """How far apart heads begin that are all equally far apart; ``None`` for others."""
        steps = {b - a for a, b in zip(self.starts, self.starts[1:], strict=False)} or {self.width}
        return steps.pop() if len(steps) == 1 and min(steps) >= self.width else None

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The heads ``[..., heads, head_dim]``: a view where they are equally far apart, else a copy."""
        if self.step is not None:
            length = self.starts[-1] - self.starts[0] + self.width
            return whole.narrow(-1, self.starts[0], length).unfold(-1, self.width, self.step)
        picked = whole.index_select(-1, self._columns(whole.device))
        return picked.unflatten(-1, (len(self.starts), self.width))

    def paste(self, whole: torch.Tensor, new: torch.Tensor) -> None:
        """Write heads ``[..., heads, head_dim]`` into the whole in place."""
        whole[..., self._columns(whole.device)] = new.flatten(-2)

    def held(self, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Which heads a piece with these spans of the features holds, and where: heads and local columns.

        Raises :class:`LayoutError` for a piece that holds only a part of a head.
        """
        local: dict[int, int] = {}
        for start, stop in spans:
            local |= {column: len(local) + column - start for column in range(start, stop)}
        heads: list[int] = []
        columns: list[int] = []
        for head, start in enumerate(self.starts):
            of_head = [local[c] for c in range(start, start + self.width) if c in local]
            if of_head and len(of_head) < self.width:
                msg = f"a rank holds only a part of head {head}: look at the projection's own site instead"
                raise LayoutError(msg)
            if of_head:
                heads.append(head)
                columns += of_head
        return heads, columns

    def layout(self, layout: Layout) -> Layout:
        """How the heads of a site lie: ``[..., heads, head_dim]``; raises as :meth:`held` does."""
        blocks: list[Block | None] = []
        for block in layout.blocks:
            if block is None:
                blocks.append(None)
                continue
            heads, _ = self.held(block[-1])
            spans = tuple((head, head + 1) for head in heads)
            blocks.append((*block[:-1], _joined(spans), ((0, self.width),)))
        shape = (*layout.shape[:-1], len(self.starts), self.width)
        dims = (*layout.dims[:-1], "heads", "head_dim")
        return Layout(shape, dims, layout.dtype, layout.mesh, tuple(blocks), layout.addends, layout.how)


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    out: list[Span] = []
    for start, stop in spans:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)
