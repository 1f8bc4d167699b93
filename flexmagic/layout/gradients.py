"""How gradients lie over the ranks, given how what they are gradients of does.

A piece's gradient is the piece of the gradient. Ranks with the same piece hold either the same
gradient or addends of it; addends are taken for such only after the derivative was measured.
Ranks with different rows contribute addends to the gradient of anything that has no rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flexmagic.layout.rule import Rule
from flexmagic.layout.seen import Seen, same
from flexmagic.layout.sites import Site

DIFFERENT = "the ranks hold different gradients of the same values, and their sum is not the derivative"


def gradient_rule(
    site: Site, forward: Rule, seen: Sequence[Mapping[Site, Seen]], groups: Sequence[int]
) -> Rule:
    """The rule for a gradient; where ranks with the same piece differ, as addends still to be verified.

    ``forward``: the rule of what it is the gradient of. ``groups``: each rank's data group.
    """
    rule = replace(forward, site=site, addends=(), how="as what it is the gradient of")
    if forward.refused:
        return rule
    missing = [str(rank) for rank in forward.ranks if site not in seen[rank]]
    if missing:
        return replace(rule, refused=f"rank {', '.join(missing)} has no gradient there")
    here = {rank: seen[rank][site] for rank in forward.ranks}
    sets: dict[tuple[object, ...], list[int]] = {}
    for rank in forward.ranks:
        place = tuple(split.place[rank] for split in forward.splits)
        sets.setdefault((place, groups[rank]), []).append(rank)
    addends = [0] * forward.mesh.size
    for ranks in sets.values():
        if all(same(here[ranks[0]], here[rank]) for rank in ranks):
            continue
        if forward.addends:
            return replace(rule, refused="the ranks hold different gradients of one sum")
        for number, rank in enumerate(ranks):
            addends[rank] = number
    by_rows = any(split.rows for split in forward.splits) or len(set(groups)) == 1
    return replace(
        rule,
        dtype=next(iter(here.values())).dtype,
        addends=tuple(addends) if any(addends) else (),
        row_addends=() if by_rows else tuple(groups),
        how="addends of the derivative, which was measured" if any(addends) else rule.how,
    )
