"""Runs of several tenants made in one forward, where nothing in them asks for more than its own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flexmagic.client import failures
from flexmagic.client.notes import notes
from flexmagic.client.planning import Planned, plan
from flexmagic.client.run import Run
from flexmagic.engine.declared import declares
from flexmagic.errors import FlexError
from flexmagic.layout.patterns import listed
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.client.tenant import Host, Tenant
    from flexmagic.engine.verbs import RunAnswer


@dataclass(frozen=True)
class Wish:
    """One run of a tenant: its inputs, and of the options of a run those that need only its rows."""

    tenant: Tenant
    inputs: Any
    capture: Sequence[str] = ()
    seed: int = 0
    only: Sequence[str] | None = None
    without: Sequence[str] = ()


def run_together(host: Host, wishes: Sequence[Wish]) -> list[Run] | None:
    """The runs of all in one forward, in order; ``None`` if it cannot be, or if something failed.

    Each is what it is alone: hooks, captures and draws of its own, on rows that no other one sees.
    Raises :class:`FlexError` for what no run could be planned for.
    """
    model = host.model
    if not model.surveyed:
        return None
    planned = [_planned(wish) for wish in wishes]
    if not all(_keeps_to_its_rows(each) for each in planned):
        return None
    capture = dict.fromkeys(site for each in planned for site in each.run.capture)
    joint = replace(plan(model, [], [], key=host.key(), seed=0).run, capture=tuple(capture))
    answers = host.calls.all("run_together", joint, [p.run for p in planned], [w.inputs for w in wishes])
    if None in answers:
        if len({answer is None for answer in answers}) > 1:
            host.calls.rebuild()  # a rank that failed alone may have left half a message behind
        _release(host, planned)
        return None
    by_run = list(zip(*answers, strict=True))
    try:
        runs = [_run(host, each, list(found)) for each, found in zip(planned, by_run, strict=True)]
    except FlexError:  # each alone says it better
        _release(host, planned)
        return None
    for wish, found in zip(wishes, by_run, strict=True):
        wish.tenant.tell(found)
    return runs


def _release(host: Host, planned: Sequence[Planned]) -> None:
    for each in planned:
        host.calls.all("release", each.run.key)


PROBE = ([list(range(1, 10))], [list(range(2, 8))])
"""Inputs of different lengths, by which it is measured whether filling up changes anything."""

SAME = 1e-5
"""Largest difference of the outputs, relative to the largest value, that counts as none."""


def fills_up(host: Host) -> bool:
    """Whether a model's rows are the same when others of a batch are longer: measured on two inputs."""
    from flexmagic.client.tenant import Tenant

    tenant = Tenant(host)
    runs = run_together(host, [Wish(tenant, ids) for ids in PROBE])
    if runs is None:
        return False
    alone = [tenant.run(ids) for ids in PROBE]
    try:
        return all(_same(one, other) for one, other in zip(runs, alone, strict=True))
    finally:
        tenant.leave([*runs, *alone])


def _same(one: Run, other: Run) -> bool:
    pairs = [(one[site].torch().double(), other[site].torch().double()) for site in other.sites]
    return bool(pairs) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= SAME * float(b.abs().max()) for a, b in pairs
    )


def _planned(wish: Wish) -> Planned:
    patterns = [Site.parse(text) for text in listed(wish.capture)]
    hooks = wish.tenant.hooks.acting(wish.only, wish.without)
    key = (wish.tenant.owner, wish.tenant.number())
    return plan(wish.tenant.model, hooks, patterns, key=key, seed=wish.seed)


def _keeps_to_its_rows(planned: Planned) -> bool:
    """Whether all that acts in a run sees its rows only, and all that is captured is so by a step's end."""
    acting: Mapping[str, Any] = {hook.source.name: hook.source for hook in planned.hooks}
    sources = [acting[name] for name, _, _, _ in planned.run.hooks]
    return not planned.run.capture_at and all(
        (declares(source) or source.boxed) and source.limits.step is None and not source.limits.when
        for source in sources
    )


def _run(host: Host, planned: Planned, answers: list[RunAnswer]) -> Run:
    model = host.model
    replies = [answer.reply for answer in answers]
    failures.raise_for(replies, model.rules)
    return Run(
        planned.run.key, host.calls, answers, model.rules, hooks=planned.all_hooks,
        warnings=tuple(notes(planned.hooks, [[reply] for reply in replies])), standing_for=model.standing_for,
        seed=planned.run.seed,
    )  # fmt: skip
