"""The survey on a rank: one tiny forward, what this rank saw of it, and the ranks' notes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flexmagic.engine.checkpoint import Checkpoint, Unsharded
from flexmagic.engine.distributed import Loaded
from flexmagic.engine.exchange import RunStopped
from flexmagic.engine.groups import Groups
from flexmagic.engine.pipeline import cuts_batches, whole_batches
from flexmagic.engine.probe import Notes, observe
from flexmagic.engine.rows import (
    batch_of,
    copies_of_a_row,
    data_ranks,
    row_groups,
    rows_from,
    with_a_row_more,
)
from flexmagic.engine.stage_standing import Standing, standing
from flexmagic.engine.tensors import local_of
from flexmagic.engine.tree import parameters_of
from flexmagic.engine.twin import Twin, probe_inputs, twin_of
from flexmagic.engine.weights import Found, LocalWeight
from flexmagic.errors import ModelError
from flexmagic.layout.dims import Dim, follow_rows
from flexmagic.layout.layout import Span, contiguous_spans
from flexmagic.layout.rule import Rule
from flexmagic.layout.seen import Probe, Seen, WeightSplit
from flexmagic.layout.sites import Site
from flexmagic.layout.survey import Evidence, infer

ROWS = (2, 4)
"""Rows of the data groups in the probe, in turn: all the same in a group, so that what follows the rows
shows itself, and not as many in all groups, so that what counts them differs."""


@dataclass(frozen=True)
class Surveyed:
    """The survey's result, the same on every rank.

    ``groups``: each rank's data group. ``overwritten``: sites the model writes into later.
    ``parameters``: shapes in the unsharded model. ``weights``: those that forwards use in parts.
    ``taken``: every rank's part of what modules take, where all take plain tensors.
    """

    rules: dict[Site, Rule]
    groups: tuple[int, ...]
    overwritten: set[Site]
    parameters: dict[str, tuple[int, ...]]
    weights: tuple[WeightSplit, ...]
    taken: dict[Site, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class _Mine:
    """What one rank contributes."""

    seen: dict[Site, Seen]
    weights: list[Found]
    overwritten: set[Site]
    owning: frozenset[str]
    called: dict[str, list[str]]
    dims: dict[Site, tuple[Dim, ...] | None]
    stands: Standing | None
    unsteady: frozenset[Site] = frozenset()
    error: str = ""


def survey(
    loaded: Loaded,
    groups: Groups,
    inputs: Mapping[str, Any] | None,
    originals: Mapping[str, torch.Tensor] | None = None,
) -> Surveyed:
    """Measure every site's layout in one forward; in two with data groups, micro-batches or no whole form.

    ``inputs``: the user's own, the same on every rank; ``None`` to make some up for a language model.
    ``originals``: this rank's parts of edited parameters as they were.
    Raises :class:`ModelError` if the forward fails on some rank.
    """
    data = row_groups(loaded.mesh, everyone(groups, data_ranks(loaded.model)))
    count = max(data) + 1
    some = max(count, 2 if count == 1 else max(ROWS) + 1)
    arguments = probe_inputs(loaded.model, some, PROBE_SEQ) if inputs is None else dict(inputs)
    assert arguments is not None  # callers ask for a made-up input only where there is one
    twin = _same_twin(twin_of(loaded.model, loaded.unsharded, arguments), groups)
    more = with_a_row_more(arguments) if twin is None else None
    if cuts_batches(loaded.model):
        more = rows_from(arguments, 0, batch_of(arguments) + 1)
    rows = [ROWS[group % len(ROWS)] for group in range(count)] if count > 1 else [batch_of(arguments)]
    if count > 1:
        mine_at = data[groups.place.rank]
        more = rows_from(arguments, mine_at, rows[mine_at] + 1)
        arguments = copies_of_a_row(arguments, mine_at, rows[mine_at])
    mine = _look(loaded, arguments, more, twin, originals)
    parts: list[_Mine] = everyone(groups, mine)
    failed = {rank: part.error for rank, part in enumerate(parts) if part.error}
    if failed:
        rank, error = next(iter(failed.items()))
        msg = f"The model's own forward failed on rank {rank}: {error}"
        raise ModelError(msg)
    seq = arguments["input_ids"].shape[1] if "input_ids" in arguments else 0
    evidence = Evidence(
        mesh=loaded.mesh,
        probe=Probe(data, tuple(rows), seq),
        seen=_without_stand_ins(parts),
        weights=_joined([part.weights for part in parts]),
        whole=_with_plain_output(twin.sites, parts) if twin else None,
        local={site: dims for part in reversed(parts) for site, dims in part.dims.items() if dims},
        unsteady=frozenset().union(*(part.unsteady for part in parts)),
        everywhere=len({part.owning for part in parts}) == 1 and all(part.stands is None for part in parts),
    )
    overwritten = set().union(*(part.overwritten for part in parts))
    return Surveyed(
        infer(evidence),
        data,
        overwritten,
        twin.parameters if twin else {},
        tuple(evidence.weights),
        _taken([part.seen for part in parts]),
    )


def _taken(seen: list[dict[Site, Seen]]) -> dict[Site, tuple[tuple[int, ...], ...]]:
    out = {}
    for site in seen[0]:
        parts = [of_rank[site] for of_rank in seen if site in of_rank]
        if site.port == "input" and len(parts) == len(seen) and not any(p.distributed for p in parts):
            out[site] = tuple(part.shape for part in parts)
    return out


def _with_plain_output(
    sites: dict[Site, tuple[Dim, ...] | None], parts: list[_Mine]
) -> dict[Site, tuple[Dim, ...] | None]:
    """The unsharded model's sites, its only output also as a plain tensor if the last stage returns one."""
    outputs = [site for site in sites if (site.path, site.port) == ("", "output")]
    plain = Site("", "output")
    if len(outputs) == 1 and any(part.stands is not None and plain in part.seen for part in parts):
        return {**sites, plain: sites[outputs[0]]}
    return sites


PROBE_SEQ = 8
"""Tokens per row in the probe: a length that most splits of a sequence divide."""


def _same_twin(mine: Twin | None, groups: Groups) -> Twin | None:
    """The unsharded form for all ranks if any has one: parts of a pipeline may differ in that."""
    having = everyone(groups, mine is not None)
    if all(having) or not any(having):
        return mine
    found = everyone(groups, mine if having.index(True) == groups.place.rank else None)
    return next(twin for twin in found if twin is not None)


SMALL = 1 << 24
"""An unsharded form of at most so many parameters is made for real, to find the ranks' weights in it."""


def everyone(groups: Groups, mine: Any) -> list[Any]:
    """What every rank says, in rank order; all ranks must call it."""
    out: list[Any] = [None] * groups.place.world_size
    dist.all_gather_object(out, mine, group=groups.own)
    return out


def together(groups: Groups, work: Callable[[], None]) -> None:
    """Do work in which a rank may fail without the others; it has failed on all then."""
    problem: Exception | None = None
    try:
        work()
    except Exception as error:  # noqa: BLE001 - all ranks must hear of it
        problem = error
    if any(everyone(groups, problem is not None)):
        raise problem or RunStopped("the backward failed on another pipeline stage")


def _look(
    loaded: Loaded,
    arguments: Mapping[str, Any],
    more: Mapping[str, Any] | None,
    twin: Twin | None,
    originals: Mapping[str, torch.Tensor] | None,
) -> _Mine:
    """Make one forward, and another with ``more`` rows where that is asked for, and return the notes."""
    wholes: Checkpoint | Unsharded = Checkpoint(loaded.folder)
    if loaded.unsharded is not None and twin is not None and twin.elements <= SMALL:
        wholes = Unsharded(loaded.unsharded)
    notes = Notes(twin.parameters if twin else {}, wholes, originals)
    try:
        with whole_batches(loaded.model):
            observe(loaded.model, lambda: loaded.model(**arguments), notes, notes.enter)
            dims, unsteady = ({}, set()) if more is None else _look_again(loaded.model, more, notes)
    except RunStopped:  # the rank at which it failed says why
        return _Mine({}, [], set(), frozenset(), {}, {}, None)
    except Exception as error:  # noqa: BLE001 - whatever the user's model raises, all ranks must hear of it
        problem = f"{type(error).__name__}: {error}"
        return _Mine({}, [], set(), frozenset(), {}, {}, None, error=problem)
    return _Mine(
        notes.seen, list(notes.weights.values()), notes.overwritten(), _owning(loaded.model), notes.called,
        dims, standing(loaded.model), frozenset(unsteady),
    )  # fmt: skip


def _look_again(
    model: nn.Module, more: Mapping[str, Any], notes: Notes
) -> tuple[dict[Site, tuple[Dim, ...] | None], set[Site]]:
    """Names for the dims of local tensors, and the sites where the first row alone does not decide its part.

    ``more``: arguments with one row more than those of the first forward, and the same first row.
    """
    dims: dict[Site, tuple[Dim, ...] | None] = {}
    unsteady: set[Site] = set()
    rows = batch_of(more)

    def look(site: Site, tensor: torch.Tensor) -> None:
        if site in notes.seen and site not in dims:
            local = local_of(tensor).detach()
            dims[site] = follow_rows(notes.seen[site].shape, tuple(local.shape), rows - 1, rows)
            if not notes.begins_as(site, local, rows):
                unsteady.add(site)

    observe(model, lambda: model(**more), look)
    return dims, unsteady


def _owning(model: nn.Module) -> frozenset[str]:
    """The modules that have parameters, themselves or inside."""
    out: set[str] = set()
    for name in parameters_of(model):
        parts = name.split(".")[:-1]
        out.update(".".join(parts[:depth]) for depth in range(len(parts) + 1))
    return frozenset(out)


def _without_stand_ins(parts: list[_Mine]) -> list[dict[Site, Seen]]:
    """What the ranks saw at modules that are theirs.

    A module that has parameters on some rank and none on this one stands in for a layer of another
    pipeline stage; what goes into a container through one, or comes out of it through one, is not
    the container's either.
    """
    owned = frozenset().union(*(part.owning for part in parts))
    out = []
    for part in parts:
        absent = owned - part.owning
        out.append(
            {
                site: seen
                for site, seen in part.seen.items()
                if not _stood_in(site.path, part.called, absent, 0 if site.port == "input" else -1)
                and not _passed_on(site, part, parts)
            }
        )
    return out


def _passed_on(site: Site, mine: _Mine, parts: list[_Mine]) -> bool:
    """Whether a module reaches over several pipeline stages, and not this one has the end asked for.

    What such a module takes on its first stage, and returns on its last, is the model's own.
    """
    if mine.stands is None or not site.path:
        return False
    inside: dict[int, set[str]] = {}
    for part in parts:
        if part.stands is not None and (used := _used_inside(site.path, part)):
            inside.setdefault(part.stands.stage, set()).update(used)
    if len({frozenset(used) for used in inside.values()}) < 2:
        return False
    return mine.stands.stage != (min(inside) if site.port == "input" else max(inside))


def _used_inside(path: str, part: _Mine) -> set[str]:
    """The modules with parameters inside a module that a rank called."""
    called = {child for children in part.called.values() for child in children}
    return {child for child in called & part.owning if child.startswith(f"{path}.")}


def _stood_in(path: str, called: Mapping[str, list[str]], absent: frozenset[str], end: int) -> bool:
    """Whether a stand-in is the module itself, or comes first (``end`` 0) or last (-1) inside it."""
    if path in absent:
        return True
    inside = called.get(path)
    return inside is not None and _stood_in(inside[end], called, absent, end)


def _joined(per_rank: list[list[Found]]) -> list[WeightSplit]:
    """Each split weight once, with the spans that every rank holds."""
    by_key: dict[tuple[str, int], dict[int, Found]] = {}
    for rank, weights in enumerate(per_rank):
        for found in weights:
            by_key.setdefault((found.weight.name, found.weight.dim), {})[rank] = found
    out = []
    for (name, dim), held in by_key.items():
        whole = next(iter(held.values())).weight.whole
        by_place = _by_place({rank: found.weight for rank, found in held.items()})
        parts: list[tuple[Span, ...] | None] = [()] * len(per_rank)
        for rank, found in held.items():
            parts[rank] = found.spans or by_place.get(rank)
        why = next((f"rank {rank} {found.why}" for rank, found in held.items() if found.why), "")
        out.append(WeightSplit(name.rpartition(".")[0], dim, whole, tuple(parts), name, why))
    return out


def _by_place(held: Mapping[int, LocalWeight]) -> dict[int, tuple[Span, ...]]:
    """The spans of the parts of a DTensor, which follow each other in the order it says."""
    sizes: dict[int, int] = {}
    for weight in held.values():
        if weight.place is None or sizes.setdefault(weight.place, weight.size) != weight.size:
            return {}
    spans = dict(zip(sorted(sizes), contiguous_spans([sizes[n] for n in sorted(sizes)]), strict=True))
    return {rank: spans[weight.place] for rank, weight in held.items() if weight.place is not None}
