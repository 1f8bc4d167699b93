"""Standard names at work: from what a user names to the model's own sites."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from flexmagic.client.table import Table
from flexmagic.engine.code import from_text
from flexmagic.errors import FlexError, SiteError
from flexmagic.layout.heads import Heads
from flexmagic.layout.patterns import missing, path_matches, starred
from flexmagic.layout.sites import Site, nearest
from flexmagic.layout.standard import Edit, Meaning, Standard, Structure, is_standard

if TYPE_CHECKING:
    import torch

    from flexmagic.client.calls import Calls
    from flexmagic.client.model import Model
    from flexmagic.engine.model_verbs import ModelReport

Target = tuple[Site, Heads | None]
"""A pattern of the model's own sites, and the heads that are meant of their features."""
MEASURING = "standard names"
"""Whose runs these are, as sessions have theirs."""


def found(
    calls: Calls, model: Model, reports: Sequence[ModelReport], kinds: Mapping[str, str]
) -> dict[str, Meaning]:
    """The standard names of a surveyed model; a few tokens are run where something has to be measured."""
    weighted = {part.path for report in reports for part in report.modules if part.owns}
    dims = {s: rule.dims for s, rule in model.rules.items() if not s.is_gradient and not rule.refused}
    heads = next((report.heads for report in reports if report.heads), None)
    structure = Structure(kinds, frozenset(weighted), dims, heads)

    def look(sites: Sequence[Site], tokens: int, edit: Edit | None) -> Mapping[Site, torch.Tensor]:
        if edit is None:
            return _look(calls, model, sites, tokens)
        site, features = edit
        body = f"x[:, 0, {list(features)}] += x.abs().max() + 1"
        source = from_text("change", 1, body, owner=MEASURING)
        calls.all("define_hook", source)
        try:
            return _look(calls, model, sites, tokens, (("change", 1, (site,), None),))
        finally:
            calls.all("forget_hook", MEASURING, "change", 1)

    return Standard(structure, look).find()


def _look(
    calls: Calls,
    model: Model,
    sites: Sequence[Site],
    tokens: int,
    hooks: tuple[tuple[str, int, tuple[Site, ...], Heads | None], ...] = (),
) -> Mapping[Site, torch.Tensor]:
    """Whole values in a forward without a user's hooks; none of a model that takes no such tokens."""
    from flexmagic.client.run import Run
    from flexmagic.engine.runtime import RunPlan

    plan = RunPlan(MEASURING, tokens, 0, hooks, capture=tuple(sites))
    with contextlib.suppress(FlexError):
        answers = calls.all("run", plan, [list(range(1, tokens + 1))])
        if None in answers or any(a.reply.error or a.reply.outcome.failures for a in answers):
            return {}
        run = Run(plan.key, calls, answers, model.rules)
        held = [site for site in sites if run.has(str(site))]
        values = {site: run[str(site)].torch() for site in held}
        run.release()
        return values
    return {}


def targets(pattern: Site, own: Iterable[str], meanings: Callable[[], Mapping[str, Meaning]]) -> list[Target]:
    """What a pattern stands for: itself where a module of the model has that name, else standard names.

    Raises :class:`SiteError` for a standard name that this model has not, saying what it has.
    """
    if not is_standard(pattern.path) or missing(pattern.path, list(own)) is None:
        return [(pattern, None)]
    known = meanings()
    absent = missing(pattern.path, list(known))
    if not known:
        return [(pattern, None)]
    if absent is not None:
        near = nearest(absent, list(known))
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It has {_has(known)}."
        msg = f"There is no standard name {absent!r} in this model. {hint}"
        raise SiteError(msg)
    named = {name: meaning for name, meaning in known.items() if path_matches(pattern.path, name)}
    there = {name: meaning for name, meaning in named.items() if not meaning.missing}
    if not there:
        name, meaning = next(iter(named.items()))
        msg = f"This model has no {name}: {meaning.missing}. It has {_has(known)}."
        raise SiteError(msg)
    return [(_site(name, meaning, pattern), meaning.heads) for name, meaning in there.items()]


def _site(name: str, meaning: Meaning, pattern: Site) -> Site:
    """The model's own site for a standard name with the user's port."""
    if not meaning.port:
        return Site(meaning.path, pattern.port, pattern.leaf)
    if pattern.port not in {"output", "grad_output"} or pattern.leaf:
        asked = f"{pattern.port}{pattern.leaf}"
        msg = f"{name} is one tensor and has no {asked}: write {name}, or {name}:grad_output."
        raise SiteError(msg)
    port = meaning.port if pattern.port == "output" else f"grad_{meaning.port}"
    return Site(meaning.path, port, meaning.leaf)


def _has(known: Mapping[str, Meaning]) -> str:
    """The standard names of a model in one line, layers as ``*``."""
    short = dict.fromkeys(
        starred(name) for name, m in known.items()
        if not m.missing and not name.startswith("layers.") and (m.port or name.count(".") < 2 or m.heads)
    )  # fmt: skip
    return ", ".join([*short, "blocks.*.attn", "blocks.*.mlp"])


def table(known: Mapping[str, Meaning]) -> Table:
    """Standard names and what they are in this model; layers alike are one row."""
    rows: dict[str, tuple[str, str]] = {}
    for name, meaning in known.items():
        inner = not meaning.port and name.count(".") > 1 and not name.endswith((".attn", ".mlp"))
        if name.startswith("layers.") or inner:
            continue
        if meaning.missing:
            rows.setdefault(starred(name), ("–", meaning.missing))
            continue
        site = starred(meaning.path) + (f":{meaning.port}{meaning.leaf}" if meaning.port else "")
        heads = meaning.heads
        shape = "" if heads is None else f"[batch, seq, {len(heads.starts)} heads, {heads.width}]"
        rows[starred(name)] = (site, shape or ("a tensor" if meaning.port else "a module"))
    return Table(
        ("standard name", "in this model", "what it is"),
        tuple((name, *row) for name, row in rows.items()),
        "" if rows else "No standard names: this model has no list of layers.",
    )
