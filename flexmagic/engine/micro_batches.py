"""What hooks see of a pipeline's micro-batches, put together: one activation for the whole batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from flexmagic.engine.pipeline import Pipeline
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site


class MicroBatches:
    """Where one run's forward is among a pipeline's micro-batches; of any other model there is one.

    A hook on whole tensors needs the whole batch: a run with one sends the batch in one piece. So does
    one that captures what cannot be joined by rows, or what depends on all rows together.
    """

    def __init__(self, model: nn.Module, rules: Mapping[Site, Rule]) -> None:
        self._pipeline = model if isinstance(model, Pipeline) else None
        self._rules = rules
        self._calls: Counter[tuple[Site, int | None]] = Counter()

    def start(self, capture: Collection[Site], *, whole: bool, context: dict[str, Any]) -> None:
        """Before a run: what it captures, whether its hooks need ``whole`` batches, where they save."""
        if self._pipeline is not None:
            rules = [self._rules[site] for site in capture if site in self._rules]
            at_once = any(rule.together or batch_dim(rule) == -1 for rule in rules)
            self._pipeline.in_one_piece = whole or at_once
            self._pipeline.context = context if whole else None

    def stop(self) -> None:
        """After the run."""
        if self._pipeline is not None:
            self._pipeline.in_one_piece, self._pipeline.context = False, None

    @property
    def several(self) -> bool:
        """Whether a run may take several forwards of a module."""
        return self._pipeline is not None

    @property
    def part(self) -> int | None:
        """The number of the part that a site's tensor is now; ``None`` if it is for the whole batch."""
        if self._pipeline is None or self._pipeline.pieces == 1:
            return None
        return self._pipeline.running

    def call(self, site: Site) -> int:
        """Count a call of a site; returns how many there were for the same rows."""
        self._calls[site, self.part] += 1
        return self._calls[site, self.part]

    def join(self, site: Site, parts: Mapping[int, torch.Tensor]) -> torch.Tensor | str:
        """A site's whole batch in the order of its rows, or why there is none."""
        assert self._pipeline is not None  # nothing else has parts
        if len(parts) < self._pipeline.pieces:
            return f"only {len(parts)} of {self._pipeline.pieces} micro-batches reached it"
        return joined(self._rules[site], [parts[n] for n in sorted(parts)])


def batch_dim(rule: Rule) -> int | None:
    """The dim that counts a batch's rows; ``None`` for none, -1 if rows cannot be joined along one."""
    follow = [at for at, dim in enumerate(rule.dims) if dim.size is None and "batch" in dim.name]
    if not follow:
        return None
    if len(follow) > 1 or rule.dims[follow[0]].name != "batch":
        return -1
    cut = any(split.dim == follow[0] and not split.rows for split in rule.splits)
    return -1 if cut else follow[0]


def joined(rule: Rule, pieces: list[torch.Tensor]) -> torch.Tensor | str:
    """The micro-batches' pieces as one, or why they are none; without a batch dim they must be equal."""
    at = batch_dim(rule)
    if at == -1:
        return "its rows are not those of the micro-batches one after the other"
    if at is None:
        first = pieces[0]
        if all(p.shape == first.shape and torch.equal(p, first) for p in pieces):
            return first
        return "the micro-batches have different values here, and no dim follows the batch"
    shapes = {(*p.shape[:at], *p.shape[at + 1 :]) for p in pieces}
    if len(shapes) > 1:
        return f"the micro-batches' shapes differ: {[tuple(p.shape) for p in pieces]}"
    return torch.cat(pieces, dim=at)
