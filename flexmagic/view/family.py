"""A tensor, and what can be looked at in its place: other layers, other steps of its run. Pure."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from flexmagic.errors import InputError
from flexmagic.view.growing import GrowingText

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flexmagic.view.source import Source

    Openers = Mapping[str, Callable[[], Source]]


class Family:
    """Tensors by the labels of their layer and step, each opened when it is chosen, and once.

    ``siblings`` are the layers beside ``source``, by label, of which ``selected`` is its own; ``steps``
    maps a step's label to what returns the layers there, ``step`` being that of ``source``.
    """

    def __init__(
        self,
        source: Source | GrowingText,
        siblings: Openers | None = None,
        selected: str | None = None,
        steps: Mapping[str, Callable[[], Openers]] | None = None,
        step: str | None = None,
    ) -> None:
        first = source.now if isinstance(source, GrowingText) else source
        own = selected if selected is not None else first.info.site
        openers = dict(siblings or {})
        openers.setdefault(own, lambda: first)
        there = "" if step is None else step
        self._by_step = dict(steps or {})
        self._by_step[there] = lambda: openers
        self._found: dict[int, Openers] = {}
        self.layers, self.steps = list(openers), list(self._by_step)
        self.layer, self.step = self.layers.index(own), self.steps.index(there)
        self._open: dict[tuple[int, int], Source | GrowingText] = {(self.layer, self.step): source}

    def at(self, layer: int, step: int) -> Source:
        """Return a tensor; raises :class:`InputError` for a layer that the step has none of."""
        if (layer, step) not in self._open:
            if step not in self._found:
                self._found[step] = self._by_step[self.steps[step]]()
            opener = self._found[step].get(self.layers[layer])
            if opener is None:
                raise InputError(f"{self.layers[layer]} was not captured in {self.steps[step]}.")
            self._open[layer, step] = opener()
        found = self._open[layer, step]
        return found.now if isinstance(found, GrowingText) else found

    def beside(self, layer: int, step: int) -> tuple[Sequence[tuple[str, Callable[[], Source]]], ...]:
        """Return what can stand side by side, by label: all layers of a step, all steps of a layer."""
        layers = [(text, partial(self.at, at, step)) for at, text in enumerate(self.layers)]
        steps = [(text, partial(self.at, layer, at)) for at, text in enumerate(self.steps)]
        return layers, steps
