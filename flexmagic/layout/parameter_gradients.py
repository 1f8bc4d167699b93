"""How the gradients of parameters lie over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flexmagic.layout.decide import Decision, from_distributed
from flexmagic.layout.dims import Dim
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.rule import Rule
from flexmagic.layout.seen import Seen, same
from flexmagic.layout.sites import Site


@dataclass(frozen=True)
class Found:
    """A rule, and whether the model itself already reduced the gradient over ranks with different rows."""

    rule: Rule
    reduced: bool = False


def parameter_gradient_rule(  # noqa: PLR0917 - one parameter and all that is known of it
    site: Site,
    mesh: Mesh,
    seen: Sequence[Mapping[Site, Seen]],
    groups: Sequence[int],
    whole: tuple[int, ...] | None = None,
    stages: Sequence[int] = (),
) -> Found:
    """The rule for a parameter's gradient, from what each rank holds of it after a backward.

    ``whole``: the parameter's shape in the unsharded model, where that is known. ``stages``: each
    rank's pipeline stage, in some numbering; what several have, each uses at its own place.
    """
    here = {rank: of_rank[site] for rank, of_rank in enumerate(seen) if site in of_rank}
    first = next(iter(here.values()))
    shape = first.shape if first.distributed is None else first.distributed.whole
    dims = tuple(Dim(f"dim{at}", n) for at, n in enumerate(shape))
    rule = Rule(site, dims, first.dtype, mesh, tuple(here), how="the parameter's own layout")
    if len({s.distributed is None for s in here.values()}) > 1:
        return Found(replace(rule, refused="some ranks hold a DTensor here and others a plain tensor"))
    if whole is not None and tuple(shape) != tuple(whole):  # equal parts, zeros say, look like copies
        return Found(replace(rule, refused="each rank holds the gradient of its own part only"))
    if first.distributed is not None:
        decision = from_distributed(Decision(tuple(here), dims, first.dtype), here)
        if decision.refused:
            return Found(replace(rule, refused=decision.refused))
        rule = replace(decision.rule(site, mesh), how=rule.how)
    if len({stages[rank] for rank in here} if stages else ()) > 1:
        if rule.addends:
            return Found(replace(rule, refused="several pipeline stages hold sums of different gradients"))
        rule = replace(rule, addends=tuple(stages), how="the sum over the stages that use it")
    return _over_groups(rule, here, groups)


def _over_groups(rule: Rule, here: Mapping[int, Seen], groups: Sequence[int]) -> Found:
    """See whether ranks that should hold the same do, in a data group and over all of them."""
    inside: dict[tuple[object, ...], Seen] = {}
    across: dict[tuple[object, ...], Seen] = {}
    equal = True
    for rank, seen in here.items():
        part = tuple(split.place[rank] for split in rule.splits), rule.addends[rank] if rule.addends else 0
        if not same(inside.setdefault((part, groups[rank]), seen), seen):
            return Found(
                replace(rule, refused="the ranks hold different gradients and do not say how they join")
            )
        equal = equal and same(across.setdefault(part, seen), seen)
    if len(set(groups)) == 1:
        return Found(rule)
    if not equal:
        return Found(replace(rule, row_addends=tuple(groups)))
    return Found(rule, reduced=True)


def without_tied(found: Mapping[Site, Found], whole: Mapping[str, tuple[int, ...]]) -> dict[Site, Found]:
    """Refuse matrices on pipeline stages that may be one parameter of the unsharded model.

    Those are matrices that it does not have under their name, and all of the same shape.
    """
    shapes = {site: tuple(dim.size for dim in its.rule.dims) for site, its in found.items()}
    strange = {shape for site, shape in shapes.items() if len(shape) > 1 and site.path not in whole}
    why = "another pipeline stage may use the same parameter under another name, which adds to its gradient"
    return {
        site: Found(replace(its.rule, refused=why)) if shapes[site] in strange else its
        for site, its in found.items()
    }
