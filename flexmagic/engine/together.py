"""Runs of several people in one forward: each has rows of its own, its own hooks there, and sees no others.

Rows of a batch do not meet in a model, which the survey has measured. Where they do, or where a run asks
for what has no rows, there is no such forward, and the client makes one for each. Shorter rows are filled
up at their ends, which changes nothing where a model looks back only: the client measures that first.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from flexmagic.engine.active_hook import ActiveHook
from flexmagic.engine.code import from_text
from flexmagic.engine.draws import draw_from
from flexmagic.engine.exchange import RunStopped
from flexmagic.engine.inputs import Prepared
from flexmagic.engine.instrument import OTHER_FAILED, Instrument
from flexmagic.engine.micro_batches import batch_dim
from flexmagic.engine.outcome import Edit, Outcome
from flexmagic.engine.rows import NoRows, batch_of, extent_of, rows_dim
from flexmagic.engine.runtime import RunPlan, RunReply, Runtime, mode
from flexmagic.engine.screen import Screen
from flexmagic.engine.stage_standing import standing
from flexmagic.engine.tensors import check_result, checksum, detached, dtype_name
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site


@dataclass(frozen=True)
class Member:
    """One run among several: its rows of the batch, tokens per row, hooks in their order and seed."""

    rows: tuple[int, int]
    length: int
    hooks: tuple[ActiveHook, ...]
    seed: int
    context: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)


@dataclass(frozen=True, kw_only=True)
class TogetherHook(ActiveHook):
    """The hooks of all members, each on its member's rows alone; ``size``: rows of the batch, and tokens."""

    members: Sequence[Member]
    size: tuple[int, int]
    rules: Mapping[Site, Rule]
    visits: Counter[Site] = field(default_factory=Counter)

    def arrive(self, site: Site, x: torch.Tensor, names: Mapping[str, Any]) -> torch.Tensor:
        """What all members' hooks leave of a whole tensor; ``x`` itself if none acts."""
        rule, out = self.rules[site], x
        dim = rows_dim(rule)
        self.visits[site] += 1
        for member in self.members:
            mine = [hook for hook in member.hooks if site in hook.sites]
            if not mine:
                continue
            if dim is None:
                raise ValueError(f"{site} has no rows")
            index = _own(rule, x.shape, member, self.size)
            own = x[index].clone()
            for hook in mine:
                own = self._edited(member, hook, site, own, names)
            out = x.clone() if out is x else out
            out[index] = own
        return out

    def _edited(
        self, member: Member, hook: ActiveHook, site: Site, own: torch.Tensor, names: Mapping[str, Any]
    ) -> torch.Tensor:
        """What one hook leaves of its member's rows, as it does alone."""
        limits = hook.source.limits
        window = replace(limits.window(self.rules[site].dims, own.shape, 0, strict=True), heads=hook.heads)
        part = window.cut(own)
        which = "" if hook.heads is None else str(hook.heads.starts)
        draw_from(f"{member.seed}|{site}{which}|{hook.source.name}|{self.visits[site]}")
        printed = Screen()
        with contextlib.redirect_stdout(cast("Any", printed)), member.outcome.timing(hook.source.name):
            result = hook.call({**names, "x": part, "ctx": member.context})
        check_result(result, part.shape, part.dtype, part.device)
        member.outcome.note(str(site), hook.source.name, printed)
        edited = result is not part
        sums = checksum(result) if edited and hook.source.boxed else (0, 0)
        member.outcome.edits.append(Edit(str(site), hook.source.name, edited, sums))
        if window.everything:
            return result
        window.paste(own, result)
        return own


def run_together(
    runtime: Runtime, joint: RunPlan, plans: Sequence[RunPlan], prepared: Sequence[Prepared]
) -> list[RunReply] | None:
    """One forward with the rows of several runs, the captures of each kept under its key.

    ``joint``: what is captured by any of them. ``None`` where that cannot be, or where something failed,
    which each alone says better.
    """
    arguments = _joined(prepared)
    lengths = {len(one.ids[0]) for one in prepared if one.ids}
    if (
        arguments is None
        or not _fits(runtime, joint, filled=len(lengths) > 1)
        or runtime.is_stale(Prepared(arguments, [], []))
    ):
        return None
    total = batch_of(arguments)
    ends = list(itertools.accumulate((len(p.ids) for p in prepared), initial=0))
    members, size = list[Member](), (total, arguments["input_ids"].shape[1])
    for plan, rows, own in zip(plans, itertools.pairwise(ends), prepared, strict=True):
        hooks = [
            ActiveHook(*runtime.hooks[plan.owner, name, version], frozenset(sites), heads)
            for name, version, sites, heads in plan.hooks
        ]
        members.append(Member(rows, len(own.ids[0]), tuple(hooks), plan.seed))
    instrument = runtime.instrument(joint, extent_of(arguments, shared_out=False))
    if sites := frozenset(site for m in members for hook in m.hooks for site in hook.sites):
        instrument.hooks.append(_hook(members, size, runtime.rules, sites))
    reply = _forward(runtime, joint, instrument, arguments)
    try:
        if reply.error or reply.outcome.failures or reply.outcome.stopped:
            return None
        out = []
        for plan, member, own in zip(plans, members, prepared, strict=True):
            mine = replace(reply, extent=extent_of(own.arguments, shared_out=False))
            out.append(_taken(runtime, (joint, plan), mine, member, size))
        return out
    finally:
        runtime.captures.drop(joint.key)


def _joined(prepared: Sequence[Prepared]) -> dict[str, Any] | None:
    """The arguments of all rows, shorter ones filled up; ``None`` for no ids, or if they differ in more."""
    others = [{k: v for k, v in p.arguments.items() if k != "input_ids"} for p in prepared]
    if any(isinstance(v, torch.Tensor) or v != others[0].get(k) for o in others for k, v in o.items()):
        return None
    if not all(p.ids for p in prepared) or any(o.keys() != others[0].keys() for o in others):
        return None
    ids = [p.arguments["input_ids"] for p in prepared]
    longest = max(one.shape[1] for one in ids)
    filled = [torch.nn.functional.pad(one, (0, longest - one.shape[1])) for one in ids]
    return {**others[0], "input_ids": torch.cat(filled)}


def _own(rule: Rule, shape: Sequence[int], member: Member, size: tuple[int, int]) -> tuple[slice, ...]:
    """Where a member's rows and tokens are in a tensor of all; raises :class:`NoRows` where they are not."""
    total, longest = size
    out = [slice(None)] * len(shape)
    at = rows_dim(rule)
    assert at is not None  # what has no rows was refused before
    per_row = shape[at] // total
    out[at] = slice(member.rows[0] * per_row, member.rows[1] * per_row)
    if member.length < longest:
        if per_row > 1 or any(split.dim in _tokens(rule) for split in rule.splits):
            raise NoRows(str(rule.site))
        for dim in _tokens(rule):
            if shape[dim] != longest:
                raise NoRows(str(rule.site))
            out[dim] = slice(0, member.length)
    return tuple(out)


def _tokens(rule: Rule) -> list[int]:
    """The dims that count tokens."""
    return [at for at, dim in enumerate(rule.dims) if dim.size is None and dim.name == "seq"]


def _fits(runtime: Runtime, joint: RunPlan, *, filled: bool) -> bool:
    """Whether rows keep apart in this model, and in all that is captured; ``filled``: some up."""
    rules = [runtime.rules[site] for site in joint.capture]
    if filled and any(split.dim in _tokens(rule) for rule in rules for split in rule.splits):
        return False
    if standing(runtime.model) is not None or max(runtime.row_groups, default=0) > 0:
        return False
    if any(rule.together for rule in runtime.rules.values()):
        return False
    return all(batch_dim(runtime.rules[site]) not in {None, -1} for site in joint.capture)


def _hook(
    members: Sequence[Member], size: tuple[int, int], rules: Mapping[Site, Rule], sites: frozenset[Site]
) -> TogetherHook:
    def call(names: dict[str, Any]) -> torch.Tensor:
        return hook.arrive(Site.parse(names["site"]), names["x"], names)

    source = from_text("together", 1, "x")
    hook = TogetherHook(source, call, sites, members=members, size=size, rules=rules)
    return hook


def _forward(runtime: Runtime, joint: RunPlan, instrument: Instrument, arguments: dict[str, Any]) -> RunReply:
    error, started = "", time.perf_counter()
    with instrument, mode(grad=False), torch.random.fork_rng(runtime.place.generators):
        torch.manual_seed(joint.seed)
        try:
            runtime.model(**arguments)
        except RunStopped as stop:
            instrument.outcome.stopped = stop.reason or OTHER_FAILED
        except Exception as problem:  # noqa: BLE001 - whatever the model raises: each run alone says it
            error = f"{type(problem).__name__}: {problem}"
    return runtime.report(joint.key, instrument, started, error)


def _taken(
    runtime: Runtime,
    plans: tuple[RunPlan, RunPlan],
    reply: RunReply,
    member: Member,
    size: tuple[int, int],
) -> RunReply:
    """Keep a member's rows of what it captures under its key, as copies: nobody holds others' rows.

    ``plans``: that of all, and the member's own.
    """
    joint, plan = plans
    local: dict[Site, tuple[tuple[int, ...], str]] = {}
    nbytes = 0
    for site in reply.local:
        if site not in plan.capture:
            continue
        piece, rule = runtime.captures.get(joint.key, site), runtime.rules[site]
        piece = piece[_own(rule, piece.shape, member, size)].clone()
        runtime.captures.keep(plan.key, site, piece)
        local[site] = tuple(piece.shape), dtype_name(piece.dtype)
        nbytes += piece.nbytes
    runtime.captures.remember(plan.key, detached(member.context))
    runtime.captures.finish(plan.key)
    outcome = replace(member.outcome, calls=reply.outcome.calls, refused=reply.outcome.refused)
    return RunReply(outcome, local, nbytes, reply.seconds, reply.extent)
