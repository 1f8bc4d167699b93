"""Low-rank adapters at modules of the model: which modules, how wide, and the hooks that add them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.errors import InputError, ModelError, SiteError
from flexmagic.layout.patterns import listed
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.client.hook_book import HookBook
    from flexmagic.client.model import Model
    from flexmagic.engine.adapter import LowRank


@dataclass(frozen=True)
class Adapter:
    """An adapter to be made: for each module its input's and output's site and width."""

    name: str
    inputs: tuple[Site, ...]
    outputs: tuple[Site, ...]
    sizes: dict[str, tuple[int, int]]
    rank: int
    scale: float

    def build(self) -> LowRank:
        """The matrices, their first values drawn from torch's generator."""
        from flexmagic.engine.adapter import LowRank

        return LowRank(self.sizes, self.rank, self.scale)

    def attach(self, hook: Callable[..., Any]) -> None:
        """Put hooks on inputs and outputs; a group named as the adapter, to switch it."""
        calls = f'modules["{self.name}"]'
        for end, sites, code in (
            ("input", self.inputs, f"{calls}.see(site, x)"),
            ("output", self.outputs, f"x = {calls}(site, x)"),
        ):
            hook([str(site) for site in sites], code, name=f"{self.name} {end}", group=self.name)


def detach(hooks: HookBook, name: str) -> None:
    """Take the hooks of an adapter off again, as far as they are there."""
    for hook in list(hooks):
        if hook.group == name and hook.name in {f"{name} input", f"{name} output"}:
            hook.remove()


def adapt(model: Model, sites: str | Sequence[str], rank: int, scale: float, name: str | None) -> Adapter:
    """What it takes to adapt the modules that patterns name.

    Raises :class:`InputError` for a rank that is none or an unsurveyed model, :class:`SiteError` for a
    module without one tensor in and one out, and what registering a hook raises.
    """
    from flexmagic.client.hooks import sites_at

    if rank < 1:
        msg = f"rank={rank}: an adapter's rank is 1 or more, e.g. rank=4."
        raise InputError(msg)
    if not model.surveyed:
        msg = "This model is surveyed at its first run: run it once, then attach the adapter."
        raise ModelError(msg)
    patterns = [Site.parse(text) for text in listed(sites)]
    paths: list[str] = []
    for pattern in patterns:
        if pattern.port != "output" or pattern.leaf:
            msg = f"{pattern} is no module: an adapter stands beside a module, e.g. {pattern.path}."
            raise InputError(msg)
        paths += [site.path for site in sites_at(model, pattern)]
    inputs, outputs, sizes = [], [], {}
    for path in dict.fromkeys(paths):
        into = _only(model, path, "input")
        out = _only(model, path, "output")
        inputs.append(into)
        outputs.append(out)
        sizes[path] = _width(model, into), _width(model, out)
    return Adapter(name or "adapter", tuple(inputs), tuple(outputs), sizes, rank, scale)


def _only(model: Model, path: str, port: str) -> Site:
    found = [site for site in model.rules if (site.path, site.port) == (path, port)]
    if len(found) != 1:
        what = ", ".join(map(str, found)) or "none"
        msg = (
            f"{path} has {len(found)} tensors as its {port} ({what}); an adapter stands beside a module "
            "that has one, such as a linear layer."
        )
        raise SiteError(msg)
    return found[0]


def _width(model: Model, site: Site) -> int:
    dims = model.rules[site].dims
    size = dims[-1].size if dims else None
    if size is None:
        msg = f"{site} has no last dim of a fixed width, so no low-rank adapter fits there."
        raise SiteError(msg)
    return size
