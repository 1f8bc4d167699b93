"""A run as a guest has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flexmagic.client.table import Table
from flexmagic.errors import InputError
from flexmagic.layout.patterns import path_matches
from flexmagic.layout.sites import Site
from flexmagic.workshop.frames import take
from flexmagic.workshop.guest_activation import GuestActivation

if TYPE_CHECKING:
    from flexmagic.workshop.link import Link


class GuestRun:
    """What a forward in a workshop left behind; index it with a site to get that site's tensor.

    ``text`` and :meth:`step`: of a generation.
    """

    def __init__(self, link: Link, said: dict[str, Any], step: int | None = None) -> None:
        self._link, self._said, self._step = link, said, step
        self.number: int = said["number"]
        self.seed: int = said["seed"]
        self.seconds: float = said["seconds"]
        self.tokens: list[list[str]] = said["tokens"]
        self.ids: list[list[int]] = said["ids"]
        self.warnings = tuple(said["warnings"])

    @property
    def sites(self) -> list[str]:
        """The sites that were captured, in the model's order."""
        return list(self._said["sites"] if self._step is None else self._said["steps"][self._step])

    @property
    def steps(self) -> int:
        """The number of forwards of a generation; 1 for a run."""
        return len(self._said.get("steps", [1]))

    def step(self, number: int) -> GuestRun:
        """One forward of a generation; raises :class:`InputError` beyond."""
        if "steps" not in self._said or not -self.steps <= number < self.steps:
            raise InputError(f"There is no step {number}: this run has {self.steps}.")
        return GuestRun(self._link, self._said, number % self.steps)

    @property
    def text(self) -> list[str]:
        """The new text of each row of a generation; empty for a run."""
        return list(self._said.get("new_text", []))

    def _ipython_key_completions_(self) -> list[str]:
        return [site.removesuffix(":output") for site in self.sites]

    def __getitem__(self, site: str | tuple[str, str]) -> GuestActivation:
        """The tensor at a site; ``run[site, hook]``: at that hook's place. Raises :class:`SiteError`."""
        text, hook = site if isinstance(site, tuple) else (site, None)
        where = {"run": self.number, "step": self._step, "site": text, "hook": hook}
        found = GuestActivation(self._link, where, lambda: self._siblings(text))
        if hook is not None or not {text, f"{text}:output"} & set(self.sites):
            _ = found.info  # that it is there
        return found

    def _siblings(self, text: str) -> dict[str, Callable[[], GuestActivation]]:
        """The captured sites that differ from one only in a layer number."""
        site = Site.parse(text)
        pattern = ".".join("*" if part.isdigit() else part for part in site.path.split("."))
        others = [(name, Site.parse(name)) for name in self.sites]
        return {
            name: (lambda name=name: self[name])  # type: ignore[misc]  # each has its own
            for name, other in others
            if path_matches(pattern, other.path) and (other.port, other.leaf) == (site.port, site.leaf)
        }

    @property
    def logits(self) -> GuestActivation:
        """The model's logits, ``[batch, seq, vocab]``; raises :class:`SiteError` for a model without."""
        return self[":output.logits"]

    def top(self, k: int = 5, *, row: int = 0, position: int = -1) -> Table:
        """The ``k`` likeliest next tokens after a position of a row, with probability and logit."""
        said, _ = self._link.ask("top", run=self.number, step=self._step, k=k, row=row, position=position)
        return Table(tuple(said["columns"]), tuple(tuple(row) for row in said["rows"]))

    @property
    def context(self) -> dict[str, Any]:
        """What hooks saved in ``ctx``: numbers, texts, and tensors as arrays."""
        said, frames = self._link.ask("context", run=self.number)
        return {**said["plain"], **{name: take(array, frames) for name, array in said["arrays"].items()}}

    def release(self) -> None:
        """Free this run's captures on the engines."""
        self._link.ask("release", run=self.number)

    def __repr__(self) -> str:
        """Run number, input size and what was captured."""
        return str(self._said["text"])
