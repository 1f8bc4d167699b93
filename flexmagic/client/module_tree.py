"""The modules of a loaded model: their names, their classes, and what each returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmagic.client.table import Table

if TYPE_CHECKING:
    from flexmagic.client.aliases import Target
    from flexmagic.engine.model_verbs import ModelReport
    from flexmagic.layout.rule import Rule
    from flexmagic.layout.sites import Site


class ModuleTree:
    """The modules that the ranks hold together, by the paths they have in the model.

    ``named``: what patterns were found to name, for as long as it is the same survey.
    """

    _reports: list[ModelReport]

    def __init__(self) -> None:
        self._modules: dict[str, str] = {}
        self.named: dict[Site, list[Target]] = {}

    @property
    def rules(self) -> dict[Site, Rule]:
        """The surveyed layout of every site."""
        return self._reports[0].rules

    @property
    def surveyed(self) -> bool:
        """Whether layouts are known; a model whose input cannot be guessed is surveyed at its first run."""
        return bool(self._reports[0].rules)

    @property
    def kinds(self) -> dict[str, str]:
        """Every module's class by path, from a rank on which the module is no stand-in."""
        if not self._modules:
            following: dict[str | None, str | None] = {None: None}  # before the first stands None
            kinds: dict[str, tuple[bool, str]] = {}
            for report in self._reports:
                before: str | None = None
                for part in report.modules:
                    if part.path not in kinds:
                        following[part.path], following[before] = following[before], part.path
                    if part.path not in kinds or part.owns > kinds[part.path][0]:
                        kinds[part.path] = part.owns, part.kind
                    before = part.path
            path = following[None]
            while path is not None:
                self._modules[path] = kinds[path][1]
                path = following[path]
        return self._modules

    @property
    def paths(self) -> list[str]:
        """All module paths, ``""`` for the model itself."""
        return list(self.kinds)

    def names(self, pattern: Site) -> list[str]:
        """What the path of a site like this one may be: a module's, or a parameter's name."""
        if pattern.port != "grad":
            return self.paths
        return list(dict.fromkeys(name for report in self._reports for name in report.parameters))

    def tree(self) -> Table:
        """The modules with the shape and layout of what each returns; numbered layers alike are one."""
        kinds = self.kinds
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
