"""A distributed model as code that runs on every rank uses it: its modules and parameters whole.

A module is called by all ranks together. Each gives it its part of what the module takes, as parts lay
in the survey, and what the ranks' modules return is joined in the same way.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from flexmagic.engine.agreement import numbers_of_all, same_request
from flexmagic.engine.distributed import local_part
from flexmagic.engine.exchange import Exchange, RunEnds, RunStopped
from flexmagic.engine.groups import Groups
from flexmagic.engine.private import kept_whole
from flexmagic.engine.probe import note
from flexmagic.engine.surveying import everyone
from flexmagic.engine.tensors import checksum, dtype_name, hollow, leaves, local_of, replace_leaf
from flexmagic.engine.tree import modules_of, parameters_of, unwrapped
from flexmagic.errors import LayoutError, SiteError
from flexmagic.layout.assemble import split
from flexmagic.layout.layout import Layout
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.parameters import parameter_layout
from flexmagic.layout.rule import Extent, Rule
from flexmagic.layout.seen import WeightSplit
from flexmagic.layout.sites import Site

EVERY_ROW = Extent(shared_out=False)
"""What is known of a module's input where every rank gives it all rows."""


@dataclass(frozen=True)
class Whole:
    """The modules and parameters of a model; every rank asks for the same at the same time.

    ``taken``: every rank's part of what each module took in the survey; ``shapes``: those of parameters in
    the unsharded model, ``weights``: which of them are held in parts. ``paused``: hooks and captures off.
    """

    model: nn.Module
    mesh: Mesh
    groups: Groups
    rules: Mapping[Site, Rule]
    taken: Mapping[Site, tuple[tuple[int, ...], ...]]
    shapes: Mapping[str, tuple[int, ...]]
    weights: Sequence[WeightSplit]
    paused: Callable[[], contextlib.AbstractContextManager[None]]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by its path."""
        return modules_of(self.model)

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self.groups.own, self.groups.place.rank, EVERY_ROW)

    # --- parameters -----------------------------------------------------------------------------------

    def parameter_name(self, path: str, name: str) -> str | None:
        """The full name of a module's own parameter, a shared one's first; ``None`` if it has none such."""
        module = self.modules.get(path)
        own = None if module is None else dict(unwrapped(module).named_parameters(recurse=False)).get(name)
        if own is None:
            return None
        return next((known for known, each in parameters_of(self.model).items() if each is own), None)

    def parameter(self, name: str) -> torch.Tensor:
        """A copy of a whole parameter; raises :class:`LayoutError` on all ranks alike if it is not known."""
        same_request(self.groups, name, well=True)
        found = parameters_of(self.model)[name]
        if hasattr(found, "ds_status") or found.is_meta or self._wrapped():
            raise LayoutError(
                f"{name} is not whole on any rank while the model runs, and cannot be gathered in the middle "
                f"of it. Read session.model.parameter({name!r}) before, and give it to the cell."
            )
        local = local_part(found).detach()
        parts = dict(enumerate(everyone(self.groups, note(local, found))))
        held = [weight for weight in self.weights if weight.name == name]
        layout = parameter_layout(self.mesh, name, parts, self.shapes.get(name), held)
        return local.clone() if layout.replicated else self._exchange.joined(layout, local)

    def _wrapped(self) -> bool:
        """Whether FSDP1 has flattened parameters of the model."""
        return any(isinstance(module, FullyShardedDataParallel) for module in self.model.modules())

    # --- modules --------------------------------------------------------------------------------------

    def call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module makes of whole tensors, as whole tensors; no hook acts and nothing is captured in it.

        Raises :class:`LayoutError` or :class:`SiteError` for a module of which that cannot be had, what
        the module raises on all ranks, and :class:`RunStopped` on all alike if the ranks differ.
        """
        module = self.modules[path]
        self._check(path, module)
        tensors = [*leaves(args), *leaves(kwargs)]
        shown = ", ".join(f"{dtype_name(t.dtype)}{list(t.shape)}" for _, t in tensors)
        lies = {where: self._layout(path, module, where, tensor) for where, tensor in tensors}
        sums = zlib.crc32(str([checksum(tensor) for _, tensor in tensors]).encode())
        same_request(self.groups, f"{path}({shown})", well=True, values=sums)
        for where, tensor in tensors:
            own = split(lies[where][1], self.groups.place.rank, tensor.detach())
            assert own is not None  # every rank took a part of it in the survey
            own = own.clone()  # the module may write into what it gets
            if where.startswith("["):
                args = replace_leaf(args, where, own)
            else:
                kwargs = replace_leaf(kwargs, where, own)
        more = lies[tensors[0][0]][0]
        returned: Any = None
        problem: BaseException | None = None
        with self.paused(), kept_whole(self._units(path)), torch.no_grad():
            try:
                returned = module(*args, **kwargs)
            except RunEnds:
                problem = SiteError(f"this run is to stop at {path}, so that it cannot be called")
            except Exception as error:  # noqa: BLE001 - whatever it raises, all ranks must hear of it
                problem = error
        return self._joined(path, returned, more, problem)

    def _check(self, path: str, module: nn.Module) -> None:
        """Refuse what cannot be called apart from the model's own forward."""
        rules = [rule for site, rule in self.rules.items() if (site.path, site.port) == (path, "output")]
        if not path:
            raise SiteError("the model cannot be called in the middle of its own forward: call a part of it")
        if not rules:
            raise SiteError(f"{path} did not run in the survey, so that what its parts make is not known")
        if self._wrapped() or any(hasattr(p, "ds_status") for p in module.parameters()):
            raise LayoutError(
                f"{path} cannot be called: its weights are gathered around the model's own forward only. "
                "Shard the model with fully_shard instead."
            )
        for rule in rules:
            if rule.refused:
                raise LayoutError(f"{path} cannot be called: {rule.site} is refused: {rule.refused}")

    def _layout(self, path: str, module: nn.Module, where: str, tensor: torch.Tensor) -> tuple[int, Layout]:
        """How many dims more than in the survey a tensor has, and how it lies as the module's input."""
        site = next((s for s in _sites(path, module, where) if s in self.rules), None)
        if site is None:
            had = ", ".join(str(s) for s in self.rules if (s.path, s.port) == (path, "input"))
            raise SiteError(f"{path} was not seen to take a tensor at {where}. It takes {had or 'none'}.")
        rule, parts = self.rules[site], self.taken.get(site)
        if rule.refused:
            raise LayoutError(f"{path} cannot be called: {site} is refused: {rule.refused}")
        if parts is None:
            raise LayoutError(f"{path} cannot be called: it takes DTensors, which only the model can make")
        more = tensor.ndim - len(rule.dims)
        moved = rule.moved(more)
        sizes = [] if moved is None else [dim.size for dim in moved.dims]
        if moved is None or any(n not in {None, m} for n, m in zip(sizes, tensor.shape, strict=True)):
            dims = ", ".join(dim.name if dim.size is None else str(dim.size) for dim in rule.dims)
            raise TypeError(f"{path} takes [{dims}] and was given {list(tensor.shape)}")
        shapes = []
        for part in parts:
            shape = list(tensor.shape)
            for each in moved.splits:
                if sizes[each.dim] is None:
                    part_of = moved.dims[each.dim].name
                    raise LayoutError(f"{path} cannot be called: each rank has a part of the {part_of} there")
                shape[each.dim] = part[each.dim - more]
            shapes.append(tuple(shape))
        return more, moved.local_layout(shapes, EVERY_ROW)

    def _units(self, path: str) -> list[FSDPModule]:
        """The unit of ``fully_shard`` that holds a module's weights, and those inside it."""
        parts, modules = path.split("."), self.modules
        around = [modules[".".join(parts[:n])] for n in range(len(parts), -1, -1)]
        first = next((module for module in around if isinstance(module, FSDPModule)), None)
        inside = [m for m in modules[path].modules() if isinstance(m, FSDPModule) and m is not first]
        return [] if first is None else [first, *inside]

    def _joined(self, path: str, returned: Any, more: int, problem: BaseException | None) -> Any:
        """What all ranks' modules returned, whole; raises the problem that all ranks have."""
        out, copies = hollow(returned), []
        found: list[tuple[str, torch.Tensor, Rule]] = []
        try:
            for where, tensor in leaves(returned):
                rule = self._returned(path, where, more)
                found.append((where, local_of(tensor), rule))
                copies += [checksum(local_of(tensor))] if rule.replicated else []
        except LayoutError as error:
            problem = error
        said = numbers_of_all(self.groups, [int(problem is None), zlib.crc32(str(copies).encode())])
        if not any(well for well, _ in said) and problem is not None:
            raise problem
        if problem is not None:
            raise RunStopped(f"{path}, which the trace called, failed: {type(problem).__name__}: {problem}")
        if not all(well for well, _ in said):
            raise RunStopped
        if len({sums for _, sums in said}) > 1:
            raise RunStopped(
                f"{path} cannot be called: its results differ between ranks on which they should be the same"
            )
        for where, local, rule in found:
            out = replace_leaf(out, where, self._exchange.gather(rule, local, well=True)[1])
        return out

    def _returned(self, path: str, where: str, more: int) -> Rule:
        rule = self.rules.get(Site(path, "output", where))
        moved = None if rule is None else rule.moved(more)
        if moved is None:
            raise LayoutError(
                f"{path} returned a tensor{f' at {where}' if where else ''} otherwise than in the survey"
            )
        return moved


def _sites(path: str, module: nn.Module, where: str) -> Iterator[Site]:
    """The site of an argument: under its place or its name, whichever way the model gives it."""
    yield Site(path, "input", where)
    match = re.match(r"\[(\d+)\]|\.(\w+)", where)
    assert match is not None  # leaves() made it
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return
    rest = where[match.end() :]
    if match[1] is not None and int(match[1]) < len(names):
        yield Site(path, "input", f".{names[int(match[1])]}{rest}")
    elif match[2] in names:
        yield Site(path, "input", f"[{names.index(match[2])}]{rest}")
