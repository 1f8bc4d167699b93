"""Runs that leave parts of the model out: those that end at a site, and those that pass modules by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flexmagic.engine.distributed import Loaded
from flexmagic.engine.exchange import RunEnds, RunStopped
from flexmagic.engine.instrument import Instrument
from flexmagic.engine.tensors import hollow, leaves, like_original, local_of, replace_leaf
from flexmagic.engine.tree import Staged, modules_of
from flexmagic.errors import ModelError
from flexmagic.layout.assemble import split
from flexmagic.layout.layout import Layout
from flexmagic.layout.rule import Extent, Rule
from flexmagic.layout.sites import Site


@dataclass(frozen=True)
class Skip:
    """A module that does not run; instead its first input passes, or a value of that shape."""

    path: str
    value: float | torch.Tensor | None = None


@dataclass(frozen=True)
class Short:
    """What of the model a run leaves out: what comes after ``stop_at``, and the modules of ``skip``."""

    stop_at: Site | None = None
    skip: tuple[Skip, ...] = ()


def check_stages(loaded: Loaded, why: str) -> None:
    """Raise :class:`ModelError` for a pipeline; ``why`` says what cannot be had over its stages."""
    sizes = dict(zip(loaded.mesh.axes, loaded.mesh.shape, strict=True))
    if isinstance(loaded.model, Staged) or sizes.get("pp", 1) > 1:
        raise ModelError(f"{why}. Load the model with --tp or --fsdp.")


@contextlib.contextmanager
def ending_at(model: nn.Module, site: Site | None, rules: Mapping[Site, Rule], rank: int) -> Iterator[None]:
    """Raise :class:`RunEnds` once a site has its value, after whatever else is hooked there.

    On a rank that does not have the site, what it has of its module is passed by.
    """
    if site is None or site.path not in modules_of(model) or not _is_here(site, rules, rank):
        yield
        return

    def end(*_: Any) -> None:
        raise RunEnds

    module = modules_of(model)[site.path]
    put = module.register_forward_pre_hook if site.port == "input" else module.register_forward_hook
    handle = put(end)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def forms_kept(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What modules return in a block, by path, ``None`` for the tensors in it; no plain tensors."""
    forms: dict[str, Any] = {}

    def keeping(path: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if path not in forms and not isinstance(output, torch.Tensor):
                forms[path] = hollow(output)

        return keep

    handles = [
        module.register_forward_hook(keeping(path)) for path, module in modules_of(model).items() if path
    ]
    try:
        yield forms
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def shortened(
    loaded: Loaded, instrument: Instrument, rules: Mapping[Site, Rule], short: Short, forms: Mapping[str, Any]
) -> Iterator[None]:
    """Hooks, captures and shortcuts on a model, for the length of a block.

    ``forms``: see :func:`forms_kept`. Raises :class:`ModelError`, on all ranks alike, for a module that
    reaches over several pipeline stages.
    """
    model, rank = loaded.model, instrument.exchange.rank
    for skip in short.skip:
        _check_one_stage(skip.path, rules)
    instrument.skipped, instrument.ends_at = frozenset(skip.path for skip in short.skip), short.stop_at
    instrument.at_once = instrument.at_once or bool(short.skip) or short.stop_at is not None
    here = modules_of(model) if short.skip else {}
    skips = [
        (skip, forms.get(skip.path))
        for skip in short.skip
        if skip.path in here and _is_here(Site(skip.path), rules, rank)
    ]
    ending = ending_at(model, short.stop_at, rules, rank)
    with instrument, passing_by(model, skips, rules, instrument), ending:
        yield


def _check_one_stage(path: str, rules: Mapping[Site, Rule]) -> None:
    known = [rule.ranks for site, rule in rules.items() if site.path == path and not rule.refused]
    if any(not set(ranks) & set(known[0]) for ranks in known):
        raise ModelError(
            f"{path} cannot be skipped: it reaches over several pipeline stages. Skip the modules inside it."
        )


def _is_here(site: Site, rules: Mapping[Site, Rule], rank: int) -> bool:
    """Whether a rank has what its module takes or returns, and is not a stand-in for another's."""
    known = [rule for s, rule in rules.items() if (s.path, s.port) == (site.path, site.port)]
    return not known or any(rule.refused or rank in rule.ranks for rule in known)


@contextlib.contextmanager
def passing_by(
    model: nn.Module, skips: Sequence[tuple[Skip, Any]], rules: Mapping[Site, Rule], instrument: Instrument
) -> Iterator[None]:
    """Let modules not run, for the length of a block; ``skips``: with the form of what each returns."""
    modules = modules_of(model) if skips else {}
    instead = {modules[skip.path]: _passing(skip, form, rules, instrument) for skip, form in skips}
    with replaced(instead):
        yield


@contextlib.contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules have other forwards, for the length of a block."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            if own is not None:  # tensor parallelism of some libraries puts its own there
                module.__dict__["forward"] = own


def _passing(skip: Skip, form: Any, rules: Mapping[Site, Rule], instrument: Instrument) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        found = next(iter([*leaves(args), *leaves(kwargs)]), None)
        returned = next((s for s in rules if s.path == skip.path and s.port == "output"), None)
        if found is None or returned is None:
            raise RunStopped(f"{skip.path} cannot be skipped: it takes or returns no tensor")
        where, tensor = found
        passed = _passed(
            skip, rules.get(Site(skip.path, "input", where)), rules[returned], tensor, instrument
        )
        return replace_leaf(form, returned.leaf, passed)

    return forward


def _passed(
    skip: Skip, taken: Rule | None, returned: Rule, tensor: torch.Tensor, instrument: Instrument
) -> torch.Tensor:
    """What a skipped module hands on: its input, or a value, as its output lies; refused on all alike."""
    if taken is None or taken.refused or returned.refused:
        raise RunStopped(f"{skip.path} cannot be skipped: how its input and output lie is not known")
    if [(d.name, d.size) for d in taken.dims] != [(d.name, d.size) for d in returned.dims]:
        shapes = (rule.describe().partition("] ")[0] + "]" for rule in (taken, returned))
        raise RunStopped(f"{skip.path} cannot be skipped: it takes {next(shapes)} and returns {next(shapes)}")
    alike = taken.lies_like(returned)
    if alike and skip.value is None:
        return tensor
    if isinstance(tensor, DTensor) and not alike:
        raise RunStopped(f"{skip.path} cannot be skipped: its output lies otherwise than its input")
    exchange, outcome = instrument.exchange, instrument.outcome
    well = not outcome.failures and not outcome.stopped
    layout, whole = exchange.gather(taken, local_of(tensor), well=well)
    if skip.value is not None:
        whole = _filled(skip, whole)
    lies = layout if alike else _layout_of(skip, taken, returned, layout, exchange.extent)
    own = split(lies, exchange.rank, whole)
    assert own is not None  # gather() refuses layouts in which a rank holds nothing
    return like_original(own, tensor)


def _filled(skip: Skip, whole: torch.Tensor) -> torch.Tensor:
    value = torch.as_tensor(skip.value, dtype=whole.dtype, device=whole.device)
    try:
        return value.expand(whole.shape).clone()
    except RuntimeError:
        shapes = f"{list(value.shape)} does not fit {list(whole.shape)}"
        raise RunStopped(f"{skip.path} cannot be skipped with this value: {shapes}") from None


def _layout_of(skip: Skip, taken: Rule, returned: Rule, layout: Layout, extent: Extent) -> Layout:
    """How the output lies, where ranks hold whole dims of it or the same parts as of the input."""
    shapes: list[tuple[int, ...] | None] = []
    for rank in range(taken.mesh.size):
        own = layout.local_shape(rank)
        if own is None:
            shapes.append(None)
            continue
        cut = {s.dim for s in returned.splits if extent.shared_out or not s.rows}
        if any(s not in taken.splits for s in returned.splits if s.dim in cut):
            raise RunStopped(f"{skip.path} cannot be skipped: its output lies otherwise than its input")
        shapes.append(tuple(own[at] if at in cut else n for at, n in enumerate(layout.shape)))
    return returned.local_layout(shapes, extent)
