"""The loaded model as the notebook sees it: modules, sites, layouts, parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmagic.client.aliases import Target, found, table, targets
from flexmagic.client.table import Table, size_text
from flexmagic.client.weights import Weights
from flexmagic.layout.sites import Site
from flexmagic.layout.standard import Meaning

if TYPE_CHECKING:
    from flexmagic.client.calls import Calls
    from flexmagic.engine.model_verbs import ModelReport
    from flexmagic.layout.mesh import Mesh
    from flexmagic.layout.rule import Rule


class Model(Weights):
    """A model split over the ranks of a session."""

    def __init__(self, calls: Calls, reports: list[ModelReport]) -> None:
        super().__init__(calls, reports)
        self.alive = True
        self._standard: dict[str, Meaning] | None = None

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
    def paths(self) -> list[str]:
        """All module paths, ``""`` for the model itself."""
        return list(self._kinds())

    def names(self, pattern: Site) -> list[str]:
        """What the path of a site like this one may be: a module's, or a parameter's name."""
        if pattern.port != "grad":
            return self.paths
        return list(dict.fromkeys(name for report in self._reports for name in report.parameters))

    @property
    def knows_gradients(self) -> bool:
        """Whether the gradients' layouts are known; they are surveyed at the first run with a loss."""
        return any(site.is_gradient for site in self._first.rules)

    def _kinds(self) -> dict[str, str]:
        """Every module's class by path, from a rank on which the module is no stand-in."""
        order: list[str] = []
        kinds: dict[str, tuple[bool, str]] = {}
        for report in self._reports:
            before = -1
            for part in report.modules:
                if part.path not in kinds:
                    order.insert(before + 1, part.path)
                if part.owns > kinds.get(part.path, (False, ""))[0] or part.path not in kinds:
                    kinds[part.path] = part.owns, part.kind
                before = order.index(part.path)
        return {path: kinds[path][1] for path in order}

    @property
    def rules(self) -> dict[Site, Rule]:
        """The surveyed layout of every site."""
        return self._first.rules

    @property
    def surveyed(self) -> bool:
        """Whether layouts are known; a model whose input cannot be guessed is surveyed at its first run."""
        return bool(self._first.rules)

    def update(self, reports: list[ModelReport]) -> None:
        """Take over a newer survey."""
        self._reports = reports
        self._standard = None

    def standing_for(self, pattern: Site) -> list[Target]:
        """The model's own sites that a pattern means, if it is one of standard names; else itself.

        Raises :class:`SiteError` for a standard name that this model has not.
        """
        return targets(pattern, self.paths, self._standard_names) if self.surveyed else [(pattern, None)]

    def _standard_names(self) -> dict[str, Meaning]:
        if self._standard is None:
            self._standard = found(self._calls, self, self._reports, self._kinds())
        return self._standard

    def aliases(self) -> Table:
        """The standard names, such as ``blocks.3.attn.pattern``, and what they are in this model.

        They are meant wherever a site is named, unless a module of the model has that very name.
        """
        return table(self._standard_names() if self.surveyed else {})

    @property
    def parameter_bytes(self) -> list[int]:
        """Bytes of parameters on each rank."""
        return [report.local_bytes for report in self._reports]

    def layout_table(self) -> Table:
        """Every site with its global shape in named dims, its layout and how that was established."""
        rows = []
        for site, rule in self.rules.items():
            dims, _, places = rule.describe().partition("] ")
            if rule.refused:
                rows.append((str(site), "", "refused", rule.refused))
            else:
                rows.append((str(site), dims.removeprefix("["), places, rule.how))
        return Table(("site", "whole shape", "layout", "how it is known"), tuple(rows), str(self))

    def tree(self) -> Table:
        """The modules with the shape and layout of what each returns; numbered layers alike are one."""
        kinds = self._kinds()
        rows: list[tuple[str, ...]] = []
        skipped: set[str] = set()
        for path, kind in kinds.items():
            if any(path == s or path.startswith(s + ".") for s in skipped):
                continue
            alike = self._alike(path, kinds)
            skipped.update(alike)
            label = path.rpartition(".")[2] or "(model)"
            last = f" … {alike[-1].rpartition('.')[2]}" if alike else ""
            depth = path.count(".") + bool(path)
            rows.append(("  " * depth + label + last, kind, *self._output(path)))
        return Table(("module", "class", "output", "layout"), tuple(rows), str(self))

    def _alike(self, path: str, kinds: dict[str, str]) -> list[str]:
        """The numbered modules that follow this one without a gap and are the same inside."""
        parent, _, number = path.rpartition(".")
        out: list[str] = []
        if number.isdigit():
            at = int(number) + 1
            while (after := f"{parent}.{at}" if parent else str(at)) in kinds:
                if self._inside(after, kinds) != self._inside(path, kinds):
                    break
                out.append(after)
                at += 1
        return out

    def _inside(self, path: str, kinds: dict[str, str]) -> list[tuple[str, ...]]:
        within = [p for p in kinds if p == path or p.startswith(path + ".")]
        return [(p[len(path) :], kinds[p], *self._output(p)) for p in within]

    def _output(self, path: str) -> tuple[str, str]:
        rules = [r for s, r in self.rules.items() if s.path == path and s.port == "output"]
        if not rules:
            return ("", "not surveyed yet" if not self.surveyed else "")
        shapes, places = [], []
        for rule in rules:
            dims, _, place = rule.describe().partition("] ")
            shapes.append(
                f"{rule.site.leaf} {dims.removeprefix('[')}".strip() if not rule.refused else "refused"
            )
            places.append(rule.refused or place)
        return "; ".join(shapes), "; ".join(dict.fromkeys(places))

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
