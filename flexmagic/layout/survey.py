"""Inferring how every site of a model lies over the ranks, from measurements that must agree.

The signals: the whole's shape from the unsharded model run without data; each rank's local shape;
fingerprints (a few fixed random linear projections of the local tensor, so that equal tensors and
the addends of a sum can be told from a handful of numbers); DTensor placements where they show;
in which order the ranks' weights follow each other; and which ranks were given the same rows.
Where they do not settle a site, the site is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexmagic.layout.decide import CONSTANT, EVEN, Decision, from_distributed, from_equality, from_shapes
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule, Split
from flexmagic.layout.seen import Probe, Seen, WeightSplit, near, same
from flexmagic.layout.settle import settle
from flexmagic.layout.sites import Site

Dims = Mapping[Site, tuple[Dim, ...] | None]


@dataclass(frozen=True)
class Evidence:
    """All that is known of a model: one entry of ``seen`` per rank, and what holds for all of them.

    ``whole``: the dims of the unsharded model's tensors, ``None`` where there is no such form to
    compare with; then ``local`` names the dims of what rank by rank was seen. ``unsteady``: sites
    where what a row gives, or what all give together, changes with the other rows or their number.
    ``everywhere``: every rank has all of the model's modules, so that all should see the same sites.
    """

    mesh: Mesh
    probe: Probe
    seen: Sequence[Mapping[Site, Seen]]
    weights: Sequence[WeightSplit]
    whole: Dims | None
    local: Dims
    unsteady: frozenset[Site] = frozenset()
    everywhere: bool = False

    def at_call(self, n: int) -> Evidence:
        """What was seen when modules were called for the n-th time, counted from 0; else the first time."""
        seen = [
            {s: its.later[n - 1] if len(its.later) >= n else its for s, its in of_rank.items()}
            for of_rank in self.seen
        ]
        return replace(self, seen=seen)


def infer(evidence: Evidence) -> dict[Site, Rule]:
    """A rule for every site that any rank saw, good for all calls of its module."""
    rules = _infer(evidence)
    calls = {
        site: max(len(of_rank[site].later) for of_rank in evidence.seen if site in of_rank) for site in rules
    }
    for n in range(1, max(calls.values(), default=0) + 1):
        again = _infer(evidence.at_call(n))
        for site, count in calls.items():
            if n <= count and not rules[site].refused and not rules[site].lies_like(again[site]):
                rules[site] = replace(rules[site], refused=again[site].refused or CALLS)
    return rules


CALLS = "its module is called several times, and what the ranks hold lies differently then"


def _infer(evidence: Evidence) -> dict[Site, Rule]:
    order = list(dict.fromkeys(site for of_rank in evidence.seen for site in of_rank))
    decided = {site: _decide(evidence, site) for site in order}
    decided = settle(decided, evidence.seen, evidence.probe)
    rules = {site: _rule(evidence, site, decision) for site, decision in decided.items()}
    if evidence.weights or not all(r.refused in UNTOLD or _is_copy(r) for r in rules.values()):
        return rules
    # every other tensor and every weight is whole everywhere: so is what could not be told from a piece
    plain = {s: replace(decided[s], refused="", how=AS_ALL) for s, rule in rules.items() if rule.refused}
    return rules | {site: _rule(evidence, site, decision) for site, decision in plain.items()}


ELSEWHERE = "rank {} has no such tensor, though it has all of the model: the ranks' forwards differ"
NO_SHAPE = "its whole shape follows the input in no known way, so no piece tells its share"
UNKNOWN_ROWS = "its shape follows the number of rows in no known way"
UNTOLD = frozenset({CONSTANT, EVEN})
"""Reasons that hold only where some of the model is split."""

AS_ALL = "equal on every rank, as all of the model is"


def _is_copy(rule: Rule) -> bool:
    return not rule.refused and rule.replicated


def _decide(evidence: Evidence, site: Site) -> Decision:
    """How the ranks that were given the same rows hold a site between them."""
    here = {rank: of_rank[site] for rank, of_rank in enumerate(evidence.seen) if site in of_rank}
    first = next(iter(here.values()))
    dims = evidence.local.get(site) or tuple(Dim(f"dim{i}") for i in range(len(first.shape)))
    base = Decision(tuple(here), dims, first.dtype)
    if evidence.everywhere and len(here) < len(evidence.seen):
        ranks = ", ".join(str(rank) for rank in range(len(evidence.seen)) if rank not in here)
        return replace(base, refused=ELSEWHERE.format(ranks))
    if len({(len(s.shape), s.dtype) for s in here.values()}) > 1:
        kinds = "; ".join(f"rank {rank} {s.shape} {s.dtype}" for rank, s in here.items())
        return replace(base, refused=f"the ranks hold tensors of different kinds: {kinds}")
    whole = evidence.whole.get(site) if evidence.whole is not None else None
    if any(s.distributed is not None for s in here.values()):
        return _of_distributed(evidence, base, whole, here)
    if evidence.whole is None:
        decision = from_equality(base, here, evidence.probe)
        unknown = first.shape and len(evidence.probe.rows) > 1 and not evidence.local.get(site)
        return replace(decision, refused=decision.refused or UNKNOWN_ROWS) if unknown else decision
    if whole is None or len(whole) != len(first.shape):
        return _without_a_shape(base, site, here, evidence)
    return from_shapes(replace(base, dims=whole), site, here, evidence.probe, evidence.weights)


def _of_distributed(
    evidence: Evidence, base: Decision, whole: tuple[Dim, ...] | None, here: Mapping[int, Seen]
) -> Decision:
    """Decide for DTensors, whose whole shape must be the unsharded model's where that is known."""
    decision = from_distributed(base, here, evidence.probe.groups)
    whole_shape = next(s.distributed.whole for s in here.values() if s.distributed is not None)
    if decision.refused or whole is None or len(whole) != len(whole_shape):
        # without an unsharded form the dims were named after one rank's part
        dims = zip(base.dims, whole_shape, strict=True)
        whole = tuple(Dim(d.name, None if d.size is None else n) for d, n in dims)
    elif any(dim.size not in (None, n) for dim, n in zip(whole, whole_shape, strict=True)):
        sizes = tuple(dim.name if dim.size is None else dim.size for dim in whole)
        return replace(decision, refused=f"its DTensor says {whole_shape}, the unsharded model {sizes}")
    if any(whole[dim].size is None for dim in decision.spans):
        decision = replace(decision, refused=GROUPS)
    return replace(decision, dims=whole)


GROUPS = "its DTensor has pieces of several groups along a dim that follows the input"


def _without_a_shape(base: Decision, site: Site, here: Mapping[int, Seen], evidence: Evidence) -> Decision:
    """A site without a known whole shape: of a model that is not split, what all hold alike is whole."""
    if evidence.whole is not None and site in evidence.whole and not evidence.weights:
        found = from_equality(base, here, evidence.probe)
        if not found.refused and len(evidence.probe.rows) == 1:
            return found
    if evidence.whole is not None and evidence.whole.get(site, ()) is None:
        return replace(base, refused=NO_SHAPE)
    return replace(base, refused="the unsharded model has no such tensor to compare with")


def _rule(evidence: Evidence, site: Site, decision: Decision) -> Rule:
    """The rule for all ranks: the decision, and the data groups' rows joined."""
    mesh, probe = evidence.mesh, evidence.probe
    rule = decision.rule(site, mesh)
    if rule.refused:
        return rule
    rule = replace(rule, together=site in evidence.unsteady)
    if len(probe.rows) == 1 or decision.across_groups:
        return rule
    if rule.together:
        return replace(rule, refused=UNSTEADY)
    return _join_rows(rule, evidence, site)


def _join_rows(rule: Rule, evidence: Evidence, site: Site) -> Rule:
    """Join a site over the data groups along the dim that follows the batch, or see that all agree."""
    probe, seen = evidence.probe, evidence.seen
    missing = {n for n, _ in enumerate(probe.rows)} - {probe.groups[rank] for rank in rule.ranks}
    if missing:
        ranks = [str(rank) for rank, group in enumerate(probe.groups) if group in missing]
        return replace(rule, refused=f"rank {', '.join(ranks)} with other rows has no such site")
    at = [n for n, dim in enumerate(rule.dims) if dim.name in {"batch", "batch·seq"}]
    if not at:
        return _the_same_everywhere(rule, evidence, site)
    if len(at) > 1:
        return replace(rule, refused="more than one of its dims follows the batch")
    if any(split.dim == at[0] for split in rule.splits):
        return replace(
            rule, refused=f"dim {at[0]} is split both by rows and between ranks with the same rows"
        )
    flat = rule.dims[at[0]].name != "batch"
    mine = [seen[rank][site] for rank in rule.ranks]
    # where all rows and positions are the same, nothing shows which of them counts first
    shown = all(s.by_rows and not (flat and 0 not in s.shape and _all_alike(s)) for s in mine)
    if (flat and at[0] != 0) or (at[0] == 0 and not shown):
        return replace(rule, refused="its order does not follow the rows of the batch")
    rows = Split(at[0], tuple(g if r in rule.ranks else None for r, g in enumerate(probe.groups)), rows=True)
    joined = f"{rule.how}; rows joined over {len(probe.rows)} data groups"
    return replace(rule, splits=(*rule.splits, rows), how=joined)


UNSTEADY = "what a row gives here depends on the other rows, of which each data group has its own"


def _the_same_everywhere(rule: Rule, evidence: Evidence, site: Site) -> Rule:
    firsts: dict[tuple[tuple[int | None, ...], int], Seen] = {}
    for rank in rule.ranks:
        part = tuple(s.place[rank] for s in rule.splits), rule.addends[rank] if rule.addends else 0
        if not same(firsts.setdefault(part, evidence.seen[rank][site]), evidence.seen[rank][site]):
            return replace(
                rule, refused="ranks with different rows hold different values, and no dim follows the batch"
            )
    return rule


def _all_alike(seen: Seen) -> bool:
    """Whether the slices along dim 0 are all the same."""
    rows = seen.slices[0] if seen.slices else ()
    return seen.constant or (bool(rows) and all(near(rows[0], row, seen.norm) for row in rows))
