"""Inferring how every site of a model lies over the ranks, from measurements that must agree.

The signals: the whole's shape from the unsharded model run without data; each rank's local shape;
fingerprints (a few fixed random linear projections of the local tensor, so that equal tensors and
the addends of a sum can be told from a handful of numbers); DTensor placements where they show;
and in which order the ranks' weights follow each other. Where they do not settle a site, the site
is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard

from flexmagic.errors import LayoutError
from flexmagic.layout.dims import Dim
from flexmagic.layout.layout import Block, Layout, Span, contiguous_spans, describe
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.sites import Site

TOLERANCE = 1e-4
"""Largest difference of fingerprints of equal tensors, relative to the tensors' norm."""


@dataclass(frozen=True)
class Seen:
    """What one rank saw at one site in the probe: plain data, a few hundred bytes.

    ``fingerprint``: projections of the flattened local tensor on fixed random vectors, ``norm``
    its Euclidean norm. ``constant``: all elements are equal (or there are none). ``placements``
    and ``whole``: what a DTensor says of itself.
    """

    shape: tuple[int, ...]
    dtype: str
    fingerprint: tuple[float, ...]
    norm: float
    constant: bool
    placements: tuple[Placement, ...] | None = None
    whole: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Expected:
    """The whole's shape under the probe, and its named dims, from the model run without data."""

    shape: tuple[int, ...]
    dims: tuple[Dim, ...] | None


@dataclass(frozen=True)
class WeightSplit:
    """How one weight of a module is split: along ``dim``, rank by rank in order, or in no known order."""

    module: str
    dim: int
    sizes: tuple[int, ...]
    in_order: bool


@dataclass(frozen=True)
class Rule:
    """How one site lies over the mesh for any input: the survey's result.

    ``sharded`` is the split dim, with ``spans`` per rank along it. ``refused`` is the reason if the
    whole cannot be established; then nothing else of the rule may be used.
    """

    site: Site
    dims: tuple[Dim, ...]
    dtype: str
    mesh: Mesh
    placements: tuple[Placement, ...] = ()
    sharded: int | None = None
    spans: tuple[tuple[Span, ...], ...] = ()
    how: str = ""
    refused: str = ""

    @property
    def partial(self) -> bool:
        """Whether the ranks hold addends of a sum."""
        return any(isinstance(p, Partial) for p in self.placements)

    def local_layout(self, local: Sequence[tuple[int, ...] | None]) -> Layout:
        """The layout of a real tensor, from every rank's local shape.

        Raises :class:`LayoutError` if the site is refused or the shapes do not follow the rule.
        """
        if self.refused:
            msg = f"{self.site} is refused: {self.refused}"
            raise LayoutError(msg)
        present = [shape for shape in local if shape is not None]
        if len(present) != len(local) or not present:
            absent = [str(rank) for rank, shape in enumerate(local) if shape is None]
            msg = f"{self.site}: rank {', '.join(absent)} never reached this site in this run"
            raise LayoutError(msg)
        whole = list(present[0])
        if any(len(shape) != len(self.dims) for shape in present):
            raise LayoutError(self._other(local))
        if self.sharded is not None:
            whole[self.sharded] = sum({spans: sum(b - a for a, b in spans) for spans in self.spans}.values())
        shape = tuple(whole)
        blocks = tuple(self._block(rank, shape) for rank in range(len(local)))
        layout = Layout(
            shape, tuple(d.name for d in self.dims), self.dtype, self.mesh, self.placements, blocks, self.how
        )
        fixed = all(d.size in (None, n) for d, n in zip(self.dims, shape, strict=True))
        if not fixed or any(layout.local_shape(rank) != tuple(s) for rank, s in enumerate(present)):
            raise LayoutError(self._other(local))
        return layout

    def _block(self, rank: int, shape: tuple[int, ...]) -> Block:
        return tuple(self.spans[rank] if dim == self.sharded else ((0, n),) for dim, n in enumerate(shape))

    def _other(self, local: Sequence[tuple[int, ...] | None]) -> str:
        return (
            f"{self.site}: the ranks' local shapes {list(local)} do not follow the surveyed layout "
            f"({self.describe()}). Load the model again to survey it anew."
        )

    def describe(self) -> str:
        """Named dims and placements in one line."""
        dims = ", ".join(d.name if d.size is None else f"{d.name} {d.size}" for d in self.dims)
        places = ", ".join(
            f"{axis}: {describe(p)}" for axis, p in zip(self.mesh.axes, self.placements, strict=False)
        )
        return f"[{dims}] {places}"


def infer(
    mesh: Mesh,
    seen: Sequence[Mapping[Site, Seen]],
    expected: Mapping[Site, Expected] | None,
    weights: Sequence[WeightSplit],
) -> dict[Site, Rule]:
    """A rule for every site that any rank saw; ``seen`` has one mapping per rank.

    ``expected`` is ``None`` when there is no unsharded form of the model to compare with; then only
    what shows a DTensor, or is the same on every rank, is given, and the rest is refused.
    """
    order = list(dict.fromkeys(site for of_rank in seen for site in of_rank))
    rules = {site: _infer_one(mesh, site, seen, expected, weights) for site in order}
    sums = [
        (site, seen[0][site])
        for site, rule in rules.items()
        if not rule.refused and all(isinstance(p, Replicate) for p in rule.placements)
    ]
    rules = {site: _as_sum(rule, seen, expected, sums) for site, rule in rules.items()}
    nothing_split = not weights and all(rule.refused in ("", CONSTANT) for rule in rules.values())
    return {site: _as_copy(rule, seen) if nothing_split else rule for site, rule in rules.items()}


CONSTANT = "all its elements are equal on every rank, so a piece cannot be told from the whole"

NO_TWIN = "the ranks hold different values, and no unsharded form of this model tells how they join"

UNSETTLED = "the ranks hold different values of the full shape, and no site holds their sum"


def _infer_one(
    mesh: Mesh,
    site: Site,
    seen: Sequence[Mapping[Site, Seen]],
    expected: Mapping[Site, Expected] | None,
    weights: Sequence[WeightSplit],
) -> Rule:
    here = [of_rank.get(site) for of_rank in seen]
    present = [s for s in here if s is not None]
    base = Rule(site, tuple(Dim(f"dim{i}") for i in range(len(present[0].shape))), present[0].dtype, mesh)
    if len(present) < len(here):
        absent = ", ".join(str(rank) for rank, s in enumerate(here) if s is None)
        return replace(base, refused=f"rank {absent} has no such site")
    if len({(len(s.shape), s.dtype) for s in present}) > 1:
        kinds = "; ".join(f"rank {r} {s.shape} {s.dtype}" for r, s in enumerate(present))
        return replace(base, refused=f"the ranks hold tensors of different kinds: {kinds}")
    if present[0].placements is not None:
        return _from_dtensor(base, present)
    if expected is None:
        return _without_twin(base, present)
    want = expected.get(site)
    if want is None or want.dims is None or len(want.shape) != len(base.dims):
        return replace(base, refused="the unsharded model has no such tensor to compare with")
    return _from_shapes(replace(base, dims=want.dims), present, want.shape, weights)


def _from_dtensor(base: Rule, present: Sequence[Seen]) -> Rule:
    placements, whole = present[0].placements, present[0].whole
    if placements is None or whole is None or any(s.placements != placements for s in present):
        return replace(base, refused="the ranks' DTensors have different placements")
    if len(placements) != 1 or type(placements[0]) not in (Shard, Replicate):
        return replace(base, refused=f"DTensor placements {placements} are not supported yet")
    dims = tuple(Dim(f"dim{i}") for i in range(len(whole)))
    base = replace(base, dims=dims, placements=placements, how="DTensor")
    placement = placements[0]
    if not isinstance(placement, Shard):
        return base
    at = placement.dim % len(whole)
    sizes = [s.shape[at] for s in present]
    if sum(sizes) != whole[at]:
        return replace(base, refused=f"the pieces' lengths {sizes} do not add up to {whole[at]}")
    fixed = replace(dims[at], size=whole[at])
    return replace(
        base,
        dims=(*dims[:at], fixed, *dims[at + 1 :]),
        placements=(Shard(at),),
        sharded=at,
        spans=tuple(contiguous_spans(sizes)),
    )


def _without_twin(base: Rule, present: Sequence[Seen]) -> Rule:
    if not _all_equal(present):
        return replace(base, refused=NO_TWIN)
    if len(present) > 1 and present[0].constant:
        return replace(base, refused=CONSTANT)
    return replace(base, placements=(Replicate(),), how="equal on every rank")


def _from_shapes(
    base: Rule, present: Sequence[Seen], want: tuple[int, ...], weights: Sequence[WeightSplit]
) -> Rule:
    shapes = [s.shape for s in present]
    differing = [d for d, n in enumerate(want) if any(shape[d] != n for shape in shapes)]
    if not differing:
        if _all_equal(present):
            return replace(base, placements=(Replicate(),), how="full shape, equal on every rank")
        return replace(base, refused=UNSETTLED)
    at = differing[0]
    leaders = _leaders(present)
    sizes = [present[rank].shape[at] for rank in sorted(set(leaders))]
    reason = _split_reason(base, differing, shapes, sizes, want) or _order_reason(
        base.site, at, len(want), want[at], weights
    )
    if reason:
        return replace(base, refused=reason)
    by_leader = dict(zip(sorted(set(leaders)), contiguous_spans(sizes), strict=True))
    shared = len(set(leaders)) < len(leaders)
    how = "pieces add up to the full length, weights in rank order" + (
        ", some ranks share a piece" if shared else ""
    )
    return replace(
        base,
        placements=(Shard(at),),
        sharded=at,
        spans=tuple(by_leader[leader] for leader in leaders),
        how=how,
    )


def _split_reason(
    base: Rule,
    differing: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    sizes: Sequence[int],
    want: tuple[int, ...],
) -> str:
    """Why local shapes are no plain split of the whole along one dim, or ``""`` where they are."""
    at = differing[0]
    if len(differing) > 1:
        return f"local shapes {list(shapes)} differ from {want} in more than one dim"
    if sum(sizes) != want[at]:
        return f"the distinct pieces' lengths {list(sizes)} along dim {at} do not add up to {want[at]}"
    if base.dims[at].size is None:
        return f"it is split along {base.dims[at].name}, whose length follows the input: not supported yet"
    return ""


def _order_reason(site: Site, at: int, ndim: int, length: int, weights: Sequence[WeightSplit]) -> str:
    """Why the pieces' order along a dim is not known, or ``""`` where the nearest weights show it."""
    own = [w for w in weights if w.module == site.path]
    if own and at == ndim - 1:
        side = 0 if site.port == "output" else 1
        own = [w for w in own if w.dim == side and sum(w.sizes) == length] or own
    near = own or _nearest_weights(site.path, weights)
    if not near:
        return "no split weight near this site shows in which order its pieces follow each other"
    unordered = sorted({w.module for w in near if not w.in_order})
    if unordered:
        return f"the weights of {', '.join(unordered)} are not split in plain rank order"
    return ""


def _nearest_weights(path: str, weights: Sequence[WeightSplit]) -> list[WeightSplit]:
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        prefix = ".".join(parts[:depth])
        inside = [w for w in weights if not prefix or w.module == prefix or w.module.startswith(prefix + ".")]
        if inside:
            return inside
    return []


def _as_sum(
    rule: Rule,
    seen: Sequence[Mapping[Site, Seen]],
    expected: Mapping[Site, Expected] | None,
    sums: Sequence[tuple[Site, Seen]],
) -> Rule:
    """Settle a site whose ranks differ at full shape: a partial sum if some site holds the sum."""
    if rule.refused != UNSETTLED or expected is None:
        return rule
    pieces = [of_rank[rule.site] for of_rank in seen]
    total = tuple(sum(values) for values in zip(*(p.fingerprint for p in pieces), strict=True))
    norm = sum(p.norm for p in pieces)
    for site, whole in sums:
        if whole.shape == pieces[0].shape and _near(total, whole.fingerprint, max(norm, whole.norm)):
            return replace(
                rule, refused="", placements=(Partial(),), how=f"the ranks' values add up to {site}"
            )
    return rule


def _as_copy(rule: Rule, seen: Sequence[Mapping[Site, Seen]]) -> Rule:
    """A constant tensor of a model of which every other tensor and every weight is whole everywhere."""
    if rule.refused != CONSTANT or any(
        of_rank[rule.site].shape != seen[0][rule.site].shape for of_rank in seen
    ):
        return rule
    return replace(
        rule, refused="", placements=(Replicate(),), how="equal on every rank, as all of the model is"
    )


def _all_equal(present: Sequence[Seen]) -> bool:
    return all(_same(present[0], other) for other in present[1:])


def _same(a: Seen, b: Seen) -> bool:
    return a.shape == b.shape and _near(a.fingerprint, b.fingerprint, max(a.norm, b.norm))


def _near(a: Sequence[float], b: Sequence[float], norm: float) -> bool:
    return all(abs(x - y) <= TOLERANCE * norm for x, y in zip(a, b, strict=True))


def _leaders(present: Sequence[Seen]) -> list[int]:
    """For each rank the first rank with the same piece."""
    return [
        next(first for first in range(rank + 1) if _same(present[first], s)) for rank, s in enumerate(present)
    ]
