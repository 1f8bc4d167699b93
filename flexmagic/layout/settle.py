"""Settling what shapes alone leave open, by finding a site that holds the same values whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flexmagic.layout.decide import Decision
from flexmagic.layout.dims import Dim
from flexmagic.layout.order import Spans, positions
from flexmagic.layout.seen import Probe, Seen, Vector, leaders, near
from flexmagic.layout.sites import Site

Decided = Mapping[Site, Decision]
All = Sequence[Mapping[Site, Seen]]
Signature = tuple[str, tuple[tuple[int, int], ...]]


def settle(decided: Decided, seen: All, probe: Probe) -> dict[Site, Decision]:
    """Replace open decisions: first the order of pieces along dims that follow the input, then sums."""
    known: dict[Signature, Site | str] = {}
    out = dict(decided)
    for site, decision in decided.items():
        if decision.open is not None and decision.open >= 0:
            signature = _signature(decision, seen, site)
            found = _order_witness(site, decision, decided, seen, probe)
            if found is not None and not isinstance(known.get(signature), str):
                known[signature] = found
    for site, decision in decided.items():
        if decision.open is not None and decision.open >= 0:
            witness = known.get(_signature(decision, seen, site))
            if isinstance(witness, str):
                out[site] = replace(decision, refused=witness)
            elif witness is not None:
                how = f"pieces add up to the full length, ordered as seen at {witness}{decision.how}"
                out[site] = replace(decision, refused="", open=None, how=how)
    return {site: _as_sum(site, decision, out, seen, probe) for site, decision in out.items()}


def _signature(decision: Decision, seen: All, site: Site) -> Signature:
    """What sites that are cut alike share: the dim's name and each rank's length along it."""
    at = decision.open
    assert at is not None  # asked of open decisions only
    return decision.dims[at].name, tuple((rank, seen[rank][site].shape[at]) for rank in decision.ranks)


def _order_witness(
    site: Site, decision: Decision, decided: Decided, seen: All, probe: Probe
) -> Site | str | None:
    """A site at which every rank's slices are found in rank order; a reason if any shows another."""
    at, witness = decision.open, None
    assert at is not None  # asked of open decisions only
    for other, its in decided.items():
        if not (its.whole_everywhere and set(decision.ranks) <= set(its.ranks) and its.dims == decision.dims):
            continue
        want = {rank: probe.shape(decision.dims, probe.groups[rank]) for rank in decision.ranks}
        found = {
            rank: where
            for rank in decision.ranks
            if (where := _found(seen[rank][site], seen[rank][other], at, want[rank])) is not None
        }
        if len(found) < len(decision.ranks):
            continue
        if not all(
            _in_order({decision.places[at][rank]: found[rank] for rank in ranks}, want[ranks[0]][at])
            for ranks in _by_group(decision, probe)
        ):
            parts = "; ".join(f"rank {rank}: {where}" for rank, where in found.items())
            return f"the ranks hold {decision.dims[at].name} positions out of order ({parts})"
        witness = witness or other
    return witness


def _in_order(by_place: Mapping[int, Sequence[int]], length: int) -> bool:
    """Whether the pieces, one after the other, are every position once and in order."""
    return [at for n in sorted(by_place) for at in by_place[n]] == list(range(length))


def _by_group(decision: Decision, probe: Probe) -> list[list[int]]:
    """The ranks that hold a site, by data group."""
    groups = sorted({probe.groups[rank] for rank in decision.ranks})
    return [probe.members(group, decision.ranks) for group in groups]


def _found(piece: Seen, whole: Seen, at: int, shape: tuple[int, ...]) -> list[int] | None:
    if piece.shape[at] == 0 and whole.shape == shape:
        return []
    if whole.shape != shape or not piece.slices or not whole.slices or not piece.slices[at]:
        return None
    return positions(piece, whole.slices[at], at, whole.norm)


def _as_sum(site: Site, decision: Decision, decided: Decided, seen: All, probe: Probe) -> Decision:
    """Settle a site whose ranks differ at full shape: addends, if some site holds the sum."""
    if decision.open != -1:
        return decision
    groups = _by_group(decision, probe)
    # ranks with the same values may hold one addend between them, or equal ones
    counted = {
        tuple(tuple(range(len(ranks))) for ranks in groups),
        tuple(tuple(leaders([seen[rank][site] for rank in ranks])) for ranks in groups),
    }
    for other, its in decided.items():
        if other == site or its.refused or its.addends or _flat(its.dims) != _flat(decision.dims):
            continue
        fitting = [
            numbers
            for numbers in counted
            if len(set(numbers)) == 1
            and all(
                _is_sum(site, [r for n, r in enumerate(ranks) if numbers[0][n] == n], other, its, seen)
                for ranks in groups
            )
        ]
        if len(fitting) == 1:
            addends = {rank: fitting[0][0][n] for ranks in groups for n, rank in enumerate(ranks)}
            how = f"the ranks' values add up to {other}"
            return replace(decision, refused="", open=None, addends=addends, how=how)
    return decision


def _flat(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """The dims with rows and positions in one, where they stand in two that follow each other."""
    apart = tuple(dims[:2]) == (Dim("batch"), Dim("seq"))
    return (Dim("batch·seq"), *dims[2:]) if apart else tuple(dims)


def _is_sum(site: Site, ranks: Sequence[int], other: Site, its: Decision, seen: All) -> bool:
    """Whether what ranks hold adds up to what another site holds, whole or along the dim it is cut."""
    pieces = [seen[rank][site] for rank in ranks]
    if not set(ranks) <= set(its.ranks):
        return False
    norm = sum(piece.norm for piece in pieces)
    if its.whole_everywhere:
        whole = seen[ranks[0]][other]
        total = _added([piece.fingerprint for piece in pieces])
        # what is projected is flat, so that rows and positions in one dim or in two are the same
        alike = math.prod(whole.shape) == math.prod(pieces[0].shape)
        return alike and near(total, whole.fingerprint, max(norm, whole.norm))
    if len(its.places) != 1 or any(len(seen[rank][other].shape) != len(pieces[0].shape) for rank in ranks):
        return False
    ((dim, place),) = its.places.items()
    wanted = _joined_slices(
        {place[rank]: seen[rank][other] for rank in reversed(ranks)}, dim, its.spans.get(dim)
    )
    have = [piece.slices[dim] if piece.slices else () for piece in pieces]
    if not wanted or any(len(rows) != len(wanted) for rows in have):
        return False
    return all(
        near(_added(rows), row, norm) for rows, row in zip(zip(*have, strict=True), wanted, strict=True)
    )


def _joined_slices(parts: Mapping[int, Seen], dim: int, spans: Spans | None) -> list[Vector]:
    """The slices of all pieces in the order of the whole; empty if some are not known."""
    out: list[tuple[int, Vector]] = []
    for n in sorted(parts):
        mine = parts[n].slices[dim] if parts[n].slices else ()
        if len(mine) != parts[n].shape[dim]:
            return []
        here = (
            [at for start, stop in spans[n] for at in range(start, stop)]
            if spans
            else range(len(out), 1 << 62)
        )
        out += zip(here, mine, strict=False)
    return [row for _, row in sorted(out, key=lambda item: item[0])]


def _added(vectors: Sequence[Vector]) -> Vector:
    return tuple(sum(values) for values in zip(*vectors, strict=True))
