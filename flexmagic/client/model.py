"""The loaded model as the notebook sees it: modules, sites, layouts, parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmagic.client.aliases import Target, found, table, targets
from flexmagic.client.module_tree import ModuleTree
from flexmagic.client.table import Table, size_text
from flexmagic.client.weights import Weights
from flexmagic.layout.sites import Site
from flexmagic.layout.standard import Meaning

if TYPE_CHECKING:
    from flexmagic.client.calls import Calls
    from flexmagic.engine.model_verbs import ModelReport
    from flexmagic.layout.mesh import Mesh


class Model(Weights, ModuleTree):
    """A model split over the ranks of a session."""

    def __init__(self, calls: Calls, reports: list[ModelReport]) -> None:
        Weights.__init__(self, calls, reports)
        ModuleTree.__init__(self)
        self.alive = True
        self._standard: dict[str, Meaning] | None = None
        self._layouts: Table | None = None

    @property
    def _first(self) -> ModelReport:
        return self._reports[0]

    @property
    def name(self) -> str:
        """The model's class."""
        return self._first.name

    @property
    def mesh(self) -> Mesh:
        """The device mesh the model lies on."""
        return self._first.mesh

    @property
    def knows_gradients(self) -> bool:
        """Whether the gradients' layouts are known; they are surveyed at the first run with a loss."""
        return any(site.is_gradient for site in self._first.rules)

    def update(self, reports: list[ModelReport]) -> None:
        """Take over a newer survey."""
        self._reports = reports
        self._standard = self._layouts = None
        self._modules, self.named = {}, {}

    def standing_for(self, pattern: Site) -> list[Target]:
        """The model's own sites that a pattern means, if it is one of standard names; else itself.

        Raises :class:`SiteError` for a standard name that this model has not.
        """
        return targets(pattern, self.paths, self._standard_names) if self.surveyed else [(pattern, None)]

    def _standard_names(self) -> dict[str, Meaning]:
        if self._standard is None:
            self._standard = found(self._calls, self, self._reports, self.kinds)
        return self._standard

    @property
    def standard(self) -> list[str]:
        """The standard names, if they are known already; asks no engine."""
        return list(self._standard or ())

    def aliases(self) -> Table:
        """The standard names, such as ``blocks.3.attn.pattern``, and what they are in this model.

        They are meant wherever a site is named, unless a module of the model has that very name.
        """
        return table(self._standard_names() if self.surveyed else {})

    def layout_table(self) -> Table:
        """Every site with its global shape in named dims, its layout and how that was established."""
        if self._layouts is not None:
            return self._layouts
        rows = []
        for site, rule in self.rules.items():
            dims, _, places = rule.describe().partition("] ")
            if rule.refused:
                rows.append((str(site), "", "refused", rule.refused))
            else:
                rows.append((str(site), dims.removeprefix("["), places, rule.how))
        columns = ("site", "whole shape", "layout", "how it is known")
        self._layouts = Table(columns, tuple(rows), str(self))
        return self._layouts

    def unwrap(self) -> int:
        """Let go of the model on every engine, without a trace on it: edited weights are put back first.

        Returns the number of forward hooks that are left on its modules, whoever put them there.
        """
        left = sum(self._calls.all("unwrap"))
        self.alive = False
        return left

    def __str__(self) -> str:
        """Class, source, mesh, what shares out the rows of a batch, and bytes per rank."""
        sizes = ", ".join(f"rank {rank} {size_text(n)}" for rank, n in enumerate(self.parameter_bytes))
        sharing = f", rows shared out by {self._first.sharing}" if self._first.sharing else ""
        return f"{self.name} from {self._first.source} on {self.mesh}{sharing}: {sizes}"

    def __repr__(self) -> str:
        """As :meth:`__str__`."""
        return f"<Model {self}>"
