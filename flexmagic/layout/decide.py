"""One site among ranks that were given the same rows: whole, split along a dim, or an addend of a sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate

from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.order import Cut, Spans, spans_by_weights
from flexmagic.layout.placement import cut_order, dim_cut, grouped_cuts
from flexmagic.layout.rule import Rule, Split
from flexmagic.layout.seen import Distributed, Probe, Seen, WeightSplit, leaders, near, same
from flexmagic.layout.sites import Site

CONSTANT = "all its elements are equal on every rank, so a piece cannot be told from the whole"
EVEN = "it does not change along one of its dims, so a piece of it cannot be told from the whole"
ZERO = "it is zero on every rank, so the addends of a sum cannot be told from copies of the whole"
ALONE = "only rank {} has it, and no unsharded form of this model tells whether it is whole there"
NO_TWIN = "the ranks hold different values, and no unsharded form of this model tells how they join"
UNSETTLED = "the ranks hold different values of the full shape, and no site holds their sum"
UNORDERED = "it is split along {}, and no site that holds the whole shows in which order"


@dataclass(frozen=True)
class Decision:
    """What ``ranks`` hold of a site: by dim, the number of each rank's piece and the pieces' spans.

    ``addends``: by rank, where they hold addends of a sum. ``open``: the dim of which the order is
    still to be found, or -1 for values of full shape that may be addends. ``across_groups``: the
    tensor says itself how it lies, rows included.
    """

    ranks: tuple[int, ...]
    dims: tuple[Dim, ...]
    dtype: str
    places: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    spans: Mapping[int, Spans] = field(default_factory=dict)
    addends: Mapping[int, int] = field(default_factory=dict)
    open: int | None = None
    across_groups: bool = False
    how: str = ""
    refused: str = ""

    def rule(self, site: Site, mesh: Mesh) -> Rule:
        """The decision spelled out for every rank of the mesh."""
        if self.refused:
            return Rule(site, self.dims, self.dtype, mesh, self.ranks, how=self.how, refused=self.refused)
        ranks = range(mesh.size)
        splits = tuple(
            Split(dim, tuple(place.get(rank) for rank in ranks), self.spans.get(dim, ()))
            for dim, place in self.places.items()
        )
        addends = tuple(self.addends.get(rank, 0) for rank in ranks) if self.addends else ()
        return Rule(site, self.dims, self.dtype, mesh, self.ranks, splits, addends, how=self.how)

    @property
    def whole_everywhere(self) -> bool:
        """Whether each rank holds all of its group's rows."""
        return not (self.refused or self.places or self.addends)


def from_shapes(
    base: Decision,
    site: Site,
    here: Mapping[int, Seen],
    probe: Probe,
    weights: Sequence[WeightSplit],
) -> Decision:
    """Decide from local shapes against the whole's, group by group; the groups must agree."""
    found = []
    for group in sorted({probe.groups[rank] for rank in here}):
        ranks = probe.members(group, list(here))
        want = probe.shape(base.dims, group)
        found.append(_group(replace(base, ranks=tuple(ranks)), site, [here[r] for r in ranks], want, weights))
    return _joined(base, found)


def _group(
    base: Decision, site: Site, pieces: Sequence[Seen], want: tuple[int, ...], weights: Sequence[WeightSplit]
) -> Decision:
    shapes = [piece.shape for piece in pieces]
    differing = [dim for dim, n in enumerate(want) if any(shape[dim] != n for shape in shapes)]
    if not differing:
        return _full(base, pieces, weights)
    if len(differing) > 1:
        return replace(base, refused=f"local shapes {shapes} differ from {want} in more than one dim")
    return _cut(base, site, pieces, (differing[0], want[differing[0]]), weights)


def _full(base: Decision, pieces: Sequence[Seen], weights: Sequence[WeightSplit]) -> Decision:
    """Ranks that hold the full shape: the whole, if they hold the same."""
    if any(leader != 0 for leader in leaders(pieces)):
        return replace(base, refused=UNSETTLED, open=-1)
    if len(pieces) == 1:
        return replace(base, how="full shape")
    # a mask may be all zeros, but its last dim follows the input; what a weight gives out has features
    may_be_sum = base.dtype.startswith(("float", "bfloat", "complex")) and base.dims and base.dims[-1].size
    if weights and may_be_sum and pieces[0].norm == 0 and 0 not in pieces[0].shape:
        return replace(base, refused=ZERO)
    return replace(base, how="full shape, equal on every rank")


def _cut(
    base: Decision,
    site: Site,
    pieces: Sequence[Seen],
    at_want: tuple[int, int],
    weights: Sequence[WeightSplit],
) -> Decision:
    """Ranks that hold less than the full length along one dim: pieces of it, if they add up."""
    at, want = at_want
    first = leaders(pieces)
    holders = sorted(set(first))
    sizes = tuple(pieces[holder].shape[at] for holder in holders)
    if sum(sizes) != want:
        reason = f"the distinct pieces' lengths {list(sizes)} along dim {at} do not add up to {want}"
        return replace(base, refused=reason)
    places = {at: {rank: holders.index(first[n]) for n, rank in enumerate(base.ranks)}}
    shared = ", some ranks share a piece" if len(holders) < len(first) else ""
    if base.dims[at].size is None:
        return replace(base, places=places, open=at, refused=UNORDERED.format(base.dims[at].name), how=shared)
    cut = Cut(at, len(base.dims), tuple(base.ranks[holder] for holder in holders), sizes)
    spans = spans_by_weights(site, cut, weights)
    if isinstance(spans, str):
        return replace(base, refused=spans)
    how = f"pieces add up to the full length, ordered as the weights are{shared}"
    return replace(base, places=places, spans={at: spans}, how=how)


def _joined(base: Decision, found: Sequence[Decision]) -> Decision:
    """One decision out of those of the data groups, if they are of one kind."""
    refusals = [f for f in found if f.refused]
    if refusals and any((f.refused, f.open) != (refusals[0].refused, refusals[0].open) for f in found):
        return replace(base, refused=f"{refusals[0].refused} (not so among all ranks)")
    forms = {
        (tuple(f.places), tuple(f.spans.items()), tuple(tuple(p.values()) for p in f.places.values()))
        for f in found
    }
    if len(forms) > 1:
        return replace(base, refused="ranks with different rows hold it split in different ways")
    places = {dim: {r: n for f in found for r, n in f.places[dim].items()} for dim in found[0].places}
    return replace(found[0], ranks=base.ranks, places=places)


def from_equality(base: Decision, here: Mapping[int, Seen], probe: Probe) -> Decision:
    """Decide without an unsharded form: only what is equal among ranks with the same rows is whole."""
    everyone = range(len(probe.groups))
    for group in sorted({probe.groups[rank] for rank in here}):
        ranks = probe.members(group, list(here))
        pieces = [here[rank] for rank in ranks]
        if len(ranks) == 1 < len(probe.members(group, everyone)):
            return replace(base, refused=ALONE.format(ranks[0]))
        if any(not same(pieces[0], piece) for piece in pieces):
            return replace(base, refused=NO_TWIN)
        if len(pieces) > 1 and (pieces[0].constant or _is_even(pieces[0], base.dims)):
            return replace(base, refused=CONSTANT if pieces[0].constant else EVEN)
    alone = len({probe.groups[rank] for rank in here}) == len(here)
    return replace(base, how="each rank computes its rows alone" if alone else "equal on every rank")


def _is_even(piece: Seen, dims: Sequence[Dim]) -> bool:
    """Whether along some dim that does not follow the rows all slices are the same."""
    return any(
        len(rows) > 1 and dim.size is not None and all(near(rows[0], row, piece.norm) for row in rows)
        for dim, rows in zip(dims, piece.slices, strict=False)
    )


def from_distributed(base: Decision, here: Mapping[int, Seen], groups: Sequence[int] = ()) -> Decision:
    """Decide from what DTensors say of themselves, held against the ranks' shapes and values.

    ``groups``: the data group of every rank; without, all ranks were given the same rows.
    """
    notes = {rank: seen.distributed for rank, seen in here.items() if seen.distributed is not None}
    first = next(iter(notes.values()))
    reason = _unlike(notes, here, groups)
    order = cut_order(first.placements, first.mesh_shape)
    odd = [p for p in first.placements if dim_cut(p) is None and not _is_copy_or_sum(p)]
    if reason or odd or order is None:
        unknown = odd[0] if odd else first.placements
        return replace(base, refused=reason or f"DTensor placement {unknown} is not supported")
    places: dict[int, dict[int, int]] = {}
    for dim, axes in order.items():
        for axis in axes:
            places[dim] = _finer(places.get(dim, {}), notes, axis)
    addends: dict[int, int] = {}
    for axis, placement in enumerate(first.placements):
        if type(placement) is Partial:
            addends = _finer(addends, notes, axis)
    across = set(first.ranks) == set(here)
    wholes = {note.ranks: note.whole for note in notes.values()}  # other rows may be more or fewer
    untrue = (_untrue(whole, {r: here[r] for r in ranks}, places) for ranks, whole in wholes.items())
    reason = next(filter(None, untrue), "") or _unequal(here, places, addends, () if across else groups)
    spans, uneven = _of_groups(first, wholes.values(), places)
    if reason or uneven:
        return replace(base, refused=reason or uneven)
    return replace(base, places=places, spans=spans, addends=addends, how="DTensor", across_groups=across)


def _of_groups(
    first: Distributed, wholes: Iterable[tuple[int, ...]], places: Mapping[int, Mapping[int, int]]
) -> tuple[dict[int, Spans], str]:
    """The spans along dims of which every rank holds a piece of several groups; or why they are not known."""
    out: dict[int, Spans] = {}
    for dim, groups in grouped_cuts(first.placements).items():
        lengths, ranks = {whole[dim] for whole in wholes}, len(set(places[dim].values()))
        length = lengths.pop()
        each, rest = divmod(length, groups * ranks)
        if lengths or rest:
            return {}, f"its {length} entries along dim {dim} are not {groups} groups of {ranks} equal pieces"
        starts = range(0, length, each * ranks)
        out[dim] = tuple(tuple((at + n * each, at + (n + 1) * each) for at in starts) for n in range(ranks))
    return out, ""


def _is_copy_or_sum(placement: Placement) -> bool:
    return isinstance(placement, Replicate) or (type(placement) is Partial and placement.reduce_op == "sum")


def _unlike(notes: Mapping[int, Distributed], here: Mapping[int, Seen], groups: Sequence[int]) -> str:
    """Why the ranks' DTensors are not parts of one or, for ranks with other rows, of one each."""
    first = next(iter(notes.values()))
    by_mesh = {n.ranks: n.whole for n in notes.values()}
    if any(
        (n.placements, n.whole, n.mesh_shape) != (first.placements, by_mesh[n.ranks], first.mesh_shape)
        for n in notes.values()
    ):
        return "the ranks' DTensors have different placements"
    if len(notes) < len(here):
        return "some ranks hold a DTensor here and others a plain tensor"
    absent = sorted({rank for n in notes.values() for rank in n.ranks} - set(here))
    if absent:
        return f"rank {', '.join(map(str, absent))} of the DTensor's mesh never came to this site"
    for n in notes.values():
        if set(n.ranks) != set(here) and groups and len({groups[rank] for rank in n.ranks}) > 1:
            return "the DTensor's mesh covers some of the ranks with other rows, and not all of them"
    return ""


def _untrue(whole: tuple[int, ...], here: Mapping[int, Seen], places: Mapping[int, Mapping[int, int]]) -> str:
    """In what the ranks' local shapes are not what their DTensors say."""
    for dim, length in enumerate(whole):
        place = places.get(dim, {})
        lengths = {place.get(rank, 0): seen.shape[dim] for rank, seen in here.items()}
        if any(lengths[place.get(rank, 0)] != seen.shape[dim] for rank, seen in here.items()):
            return f"ranks with the same piece along dim {dim} hold different lengths of it"
        if sum(lengths.values()) != length:
            return f"the pieces' lengths {[lengths[n] for n in sorted(lengths)]} do not add up to {length}"
    return ""


def _unequal(
    here: Mapping[int, Seen],
    places: Mapping[int, Mapping[int, int]],
    addends: Mapping[int, int],
    groups: Sequence[int],
) -> str:
    """Which ranks should hold copies of each other, and do not."""
    firsts: dict[tuple[tuple[int, ...], int, int], int] = {}
    for rank, seen in here.items():
        part = tuple(place[rank] for place in places.values())
        other = firsts.setdefault((part, addends.get(rank, 0), groups[rank] if groups else 0), rank)
        if not same(here[other], seen):
            return f"the DTensors say that ranks {other} and {rank} hold the same, and they do not"
    return ""


def _finer(place: Mapping[int, int], notes: Mapping[int, Distributed], axis: int) -> dict[int, int]:
    """Number the pieces along one more mesh axis that cuts them."""
    return {
        rank: place.get(rank, 0) * note.mesh_shape[axis] + note.coordinate[axis]
        for rank, note in notes.items()
    }
