"""What forwards of one input have in common: the layers before the first that any of them touches.

They are computed once, for the input as it is. A forward of many copies of its rows, none of which is
touched before some layer, then begins with what the layer before it returned.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flexmagic.engine.agreement import numbers_of_all
from flexmagic.engine.groups import Groups
from flexmagic.engine.origin import versions_of
from flexmagic.engine.rows import NoRows, rows_dim
from flexmagic.engine.shortcuts import replaced
from flexmagic.engine.tensors import leaves, replace_leaf
from flexmagic.engine.tree import modules_of
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site

MOST = 256 << 20
"""Bytes that the layers' outputs may take on a rank; those of a longer input are not kept."""


@dataclass
class _Ran:
    """What one layer did in the forward: ``taken`` and ``given`` are the tensors that came in and out."""

    path: str
    calls: int = 0
    taken: list[torch.Tensor] = field(default_factory=list)
    output: Any = None
    versions: list[int] = field(default_factory=list)

    @property
    def given(self) -> list[torch.Tensor]:
        return [tensor for _, tensor in leaves(self.output)]


@dataclass(frozen=True)
class Prefix:
    """The outputs of a model's layers by path, in order: each is all that the next one takes of it.

    ``key``: what they are of; ``versions``: those of the parameters that made them.
    """

    key: tuple[str, int]
    outputs: Mapping[str, Any]
    versions: Mapping[str, int]

    def untouched(self, wanted: Sequence[Site | None]) -> list[str]:
        """The layers that come before all sites of some; none if it is not known where a site is."""
        paths = list(self.outputs)
        depth = len(paths)
        for site in wanted:
            if site is None or (site.path == "" and site.port == "output"):
                continue
            inside = [at for at, p in enumerate(paths) if site.path == p or site.path.startswith(f"{p}.")]
            depth = min([depth, *(inside or [0])])
        return paths[:depth]

    @contextlib.contextmanager
    def begun(
        self,
        model: nn.Module,
        paths: Sequence[str],
        rules: Mapping[Site, Rule],
        count: int,
        aside: Callable[[], bool],
    ) -> Iterator[None]:
        """Forwards in a block do not run these layers; ``count``: how often the batch has the rows.

        ``aside``: whether what runs now is not the forward, but a module called by itself, which does run.
        """
        modules = modules_of(model)
        instead = {
            modules[path]: _returning(
                repeated(self.outputs[path], path, rules, count), modules[path].forward, aside
            )
            for path in paths
        }
        with replaced(instead):
            yield


def layers(model: nn.Module) -> list[str]:
    """The outermost numbered modules, ``model.layers.0`` but not the experts in it."""
    return [
        path
        for path in modules_of(model)
        if path.rpartition(".")[2].isdigit() and not any(p.isdigit() for p in path.split(".")[:-1])
    ]


def prefix_of(
    model: nn.Module,
    rules: Mapping[Site, Rule],
    groups: Groups,
    forward: Callable[[], object],
    *,
    overwritten: Collection[Site],
    key: tuple[str, int],
    known: Prefix | None,
) -> Prefix:
    """Run a forward and keep what its layers return; the same layers on all ranks, which call it together.

    ``overwritten``: sites that the model was seen to write into, which torch's counter of versions does not
    always tell. ``known``: what was kept before, which is returned if it is of this key and the same
    parameters.

    Kept are those of the first list of modules that run once each, one after the other, and hand on to the
    next all that they return, of which each rank has its own rows, and that the model does not overwrite.
    """
    versions = versions_of(model)
    stale = known is None or known.key != key or known.versions != versions
    if any(number for (number,) in numbers_of_all(groups, [int(stale)])):
        known = None  # also where only another rank has none, as one that was started anew
    if known is not None:
        return known
    ran = _watched(model, forward)
    chains: dict[str, list[_Ran]] = {}
    for one in ran:
        chains.setdefault(one.path.rpartition(".")[0], []).append(one)
    chain = next(
        (chain for chain in chains.values() if len(chain) > 1 and _is_chain(chain, rules, overwritten)), []
    )
    if sum(tensor.nbytes for one in chain for tensor in one.given) > MOST:
        chain = []
    if len({tuple(numbers) for numbers in numbers_of_all(groups, [len(chain), len(ran)])}) > 1:
        chain = []
    return Prefix(key, {one.path: one.output for one in chain}, versions)


def _watched(model: nn.Module, forward: Callable[[], object]) -> list[_Ran]:
    """Run a forward; the layers in the order in which they ran."""
    found: dict[str, _Ran] = {}
    handles = []
    modules = modules_of(model)
    for path in layers(model):

        def keep(_module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            one = found.setdefault(path, _Ran(path))
            one.calls += 1
            one.taken = [tensor for value in (args, kwargs) for _, tensor in leaves(value)]
            one.output = output
            one.versions = [tensor._version for tensor in one.given]  # noqa: SLF001 - torch's documented counter

        handles.append(modules[path].register_forward_hook(keep, with_kwargs=True))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _is_chain(chain: Sequence[_Ran], rules: Mapping[Site, Rule], overwritten: Collection[Site]) -> bool:
    numbers = [int(one.path.rpartition(".")[2]) for one in chain]
    return (
        numbers == list(range(len(chain)))
        and all(_is_kept(one, rules, overwritten) for one in chain)
        and all(
            any(tensor is taken for taken in after.taken)
            for one, after in itertools.pairwise(chain)
            for tensor in one.given
        )
    )


def _is_kept(one: _Ran, rules: Mapping[Site, Rule], overwritten: Collection[Site]) -> bool:
    """Whether a layer's output is tensors that nothing wrote into, with rows of this rank alone."""
    if one.calls != 1 or not one.given or not _plain(one.output):
        return False
    if any(tensor._version != version for tensor, version in zip(one.given, one.versions, strict=True)):  # noqa: SLF001
        return False
    sites = [Site(one.path, "output", where) for where, _ in leaves(one.output)]
    return all(site not in overwritten and _repeats(rules.get(site)) for site in sites)


def _plain(output: Any) -> bool:
    if isinstance(output, (tuple, list)):
        return all(_plain(item) for item in output)
    return output is None or (isinstance(output, torch.Tensor) and not isinstance(output, DTensor))


def _repeats(rule: Rule | None) -> bool:
    """Whether more copies of the rows make a rank's piece so many copies of what it is."""
    if rule is None or rule.refused:
        return False
    try:
        dim = rows_dim(rule)
    except NoRows:
        return False
    return dim is not None and all(split.rows or split.dim != dim for split in rule.splits)


def repeated(output: Any, path: str, rules: Mapping[Site, Rule], count: int) -> Any:
    """An output of the rows as of a batch that has all of them so often, one after the other."""
    for where, tensor in list(leaves(output)):
        dim = rows_dim(rules[Site(path, "output", where)])
        assert dim is not None  # _repeats() asked
        output = replace_leaf(output, where, torch.cat([tensor] * count, dim))
    return output


def _returning(output: Any, forward: Callable[..., Any], aside: Callable[[], bool]) -> Callable[..., Any]:
    def returned(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if aside() else output

    return returned
