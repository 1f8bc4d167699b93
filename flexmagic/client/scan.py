"""Shapes of all sites for an input that no rank has computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client.table import Table
from flexmagic.layout.patterns import listed
from flexmagic.layout.sites import Site, check_paths, one_of, resolve

if TYPE_CHECKING:
    from flexmagic.client.calls import Calls
    from flexmagic.client.model import Model
    from flexmagic.engine.scan import Scanned


class Scan:
    """Whole shape and dtype of sites: ``scan["model.layers.3.mlp"].shape``."""

    def __init__(self, found: dict[Site, Scanned], title: str, layouts: dict[Site, str]) -> None:
        self._found, self._title, self._layouts = found, title, layouts

    @property
    def sites(self) -> list[str]:
        """The sites, in the model's order."""
        return [str(site) for site in self._found]

    def __getitem__(self, site: str) -> Scanned:
        """Shape and dtype at a site; raises :class:`SiteError`."""
        return self._found[one_of(site, self._found)]

    def table(self) -> Table:
        """Each site with its whole shape, dtype, the names of its dims and how it is known."""
        rows = tuple(
            (str(site), " × ".join(map(str, s.shape)), s.dtype, self._layouts.get(site, ""), s.how)
            for site, s in self._found.items()
        )
        return Table(("site", "whole shape", "dtype", "layout", "how it is known"), rows, self._title)

    def __repr__(self) -> str:
        """The table as text."""
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def scanned(calls: Calls, model: Model, inputs: Any, sites: str | Sequence[str]) -> Scan:
    """What rank 0 finds; the raises are those of :meth:`Cells.scan`."""
    patterns = [Site.parse(text) for text in (listed(sites) if sites else ())]
    for pattern in patterns:
        check_paths(pattern, model.paths)
    found: dict[Site, Scanned] = calls.one(0, "scan", inputs)
    if patterns:
        wanted = {site for pattern in patterns for site in resolve(pattern, found)}
        found = {site: shape for site, shape in found.items() if site in wanted}
    layouts = {s: f"refused: {r.refused}" if r.refused else r.describe() for s, r in model.rules.items()}
    return Scan(found, f"{model.name}, nothing computed", layouts)
