"""Which hooks act and what is captured in one run, spelled out for the engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.client.hooks import exact_sites, sites_at, targets_at
from flexmagic.errors import InputError
from flexmagic.layout.heads import Heads
from flexmagic.layout.patterns import listed, path_matches
from flexmagic.layout.sites import Site, check_paths

if TYPE_CHECKING:
    from flexmagic.client.aliases import Target
    from flexmagic.client.hooks import Hook
    from flexmagic.client.model import Model
    from flexmagic.engine.captures import RunKey
    from flexmagic.engine.code import HookSource
    from flexmagic.engine.limits import Picks
    from flexmagic.engine.loss import LossSource
    from flexmagic.engine.runtime import RunPlan
    from flexmagic.engine.shortcuts import Skip
    from flexmagic.engine.tracing import TraceSource

Skipped = str | Sequence[str] | Mapping[str, Any]
"""Modules that do not run, by pattern; of a mapping the values pass instead, ``None`` for the input."""


@dataclass(frozen=True)
class Acting:
    """A hook in one run, and the exact sites it is for; ``waits``: why it does not act in this one.

    ``heads``: sites of whose features it has heads, once for each of their kinds.
    """

    source: HookSource
    sites: tuple[Site, ...]
    waits: str = ""
    heads: tuple[Target, ...] = ()

    def by_heads(self, sites: Sequence[Site]) -> list[tuple[tuple[Site, ...], Heads | None]]:
        """Some of its sites, those together of which it has the same heads."""
        found: dict[Heads | None, list[Site]] = {}
        for site in sites:
            for heads in [h for s, h in self.heads if s == site] or [None]:
                found.setdefault(heads, []).append(site)
        return [(tuple(of), heads) for heads, of in found.items()]

    def __str__(self) -> str:
        """Name and version."""
        return f"{self.source.name} v{self.source.version}"


@dataclass(frozen=True)
class Planned:
    """A run as the engines get it, and the hooks in the order in which they act."""

    run: RunPlan
    hooks: tuple[Acting, ...]

    @property
    def all_hooks(self) -> tuple[Acting, ...]:
        """The hooks and, after them, the run's trace, which acts wherever it asks to."""
        traces = () if self.run.trace is None else (self.run.trace.code,)
        return (*self.hooks, *(Acting(code, ()) for code in traces))


def plan(
    model: Model,
    hooks: Sequence[Hook],
    patterns: Sequence[Site],
    *,
    key: RunKey,
    seed: int,
    grad: bool = False,
    backward: str | Callable[[Any], Any] | LossSource | None = None,
    stop_at: str | None = None,
    skip: Skipped = (),
    trace: TraceSource | None = None,
) -> Planned:
    """A run's plan.

    Raises :class:`~flexmagic.errors.InputError` for gradients asked of a run without a loss, and for
    a loss of a run that does not reach its end.
    """
    from flexmagic.engine.runtime import RunPlan
    from flexmagic.engine.shortcuts import Short

    capture = [
        s for s, rule in model.rules.items() if s.path == "" and s.port == "output" and not rule.refused
    ]
    at_steps: list[tuple[Site, Picks]] = []
    for pattern in patterns:
        _check_loss(pattern, backward)
        capture += [site for site in sites_at(model, pattern) if not model.rules[site].refused]
    end = _end(model, stop_at, backward)
    if end is not None:
        capture += [s for s in sites_at(model, end) if not model.rules[s].refused]
    owner, number = key[:2]
    acting = [_acting(model, hook, number, with_loss=backward is not None) for hook in hooks]
    for hook in acting:
        captured = [site for site in hook.sites if not model.rules[site].refused]
        steps = hook.source.limits.step
        if hook.source.captures_only and hook.waits:
            continue
        if hook.source.captures_only and steps is not None:
            at_steps += [(site, steps) for site in captured]
        else:
            capture += captured
    run = RunPlan(
        owner,
        number,
        seed,
        _on_site(acting),
        tuple(dict.fromkeys(capture)),
        tuple(at_steps),
        grad or backward is not None,
        _loss(backward),
        Short(end, _skips(model, skip)),
        trace,
    )
    return Planned(run, tuple(acting))


def _on_site(hooks: Sequence[Acting]) -> tuple[tuple[str, int, tuple[Site, ...], Heads | None], ...]:
    """The hooks that run, with their sites: of those that only capture, where others run after them."""
    out: list[tuple[str, int, tuple[Site, ...], Heads | None]] = []
    later: set[Site] = set()
    for hook in reversed(hooks):
        sites = tuple(s for s in hook.sites if s in later) if hook.source.captures_only else hook.sites
        if sites and not hook.waits:
            parts = reversed(hook.by_heads(sites))
            out += [(hook.source.name, hook.source.version, of, heads) for of, heads in parts]
            later.update(() if hook.source.captures_only else sites)
    return tuple(reversed(out))


def _acting(model: Model, hook: Hook, number: int, *, with_loss: bool) -> Acting:
    """What a hook does in the run of a number."""
    source = hook.current.source
    wanted = [p for p in hook.current.patterns if with_loss or not p.is_gradient]
    waits = ""
    if not wanted:
        waits = "its sites are gradients, and this run has no loss"
    elif not source.limits.meets(number):
        waits = f"it acts in every {source.limits.every}. run, and this is run {number}"
    sites = exact_sites(model, wanted, source)
    known = model.surveyed and not source.captures_only
    named = [t for p in wanted if known for t in targets_at(model, p) if t[0] in sites]
    every = {site for site, heads in named if heads is not None}
    return Acting(source, sites, waits, tuple(dict.fromkeys(t for t in named if t[0] in every)))


def _end(model: Model, stop_at: str | None, backward: object) -> Site | None:
    """The one site at which a run ends."""
    if stop_at is None:
        return None
    pattern = Site.parse(stop_at)
    if backward is not None or pattern.is_gradient:
        msg = f"A run that stops at {pattern} has no gradients: its outputs are never computed."
        raise InputError(msg)
    found = list(dict.fromkeys((site.path, site.port) for site in sites_at(model, pattern)))
    if len(found) > 1:
        msg = f"A run ends once: {pattern} names {len(found)} sites, the first of them {Site(*found[0])}."
        raise InputError(msg)
    return Site(*found[0])


def _skips(model: Model, skip: Skipped) -> tuple[Skip, ...]:
    """Every module that does not run, with what passes instead."""
    from flexmagic.engine.shortcuts import Skip

    given = skip if isinstance(skip, Mapping) else dict.fromkeys(listed(skip))
    out: dict[str, Skip] = {}
    for text, value in given.items():
        pattern = Site.parse(text)
        if pattern.port != "output" or pattern.leaf:
            msg = f"{text} is no module: name what is skipped without a port, e.g. {pattern.path}."
            raise InputError(msg)
        for own, _ in model.standing_for(pattern):
            check_paths(own, model.paths)
            for path in model.paths:
                if path and path_matches(own.path, path):
                    out[path] = Skip(path, value)
    return tuple(out.values())


def _check_loss(pattern: Site, backward: object) -> None:
    if pattern.is_gradient and backward is None:
        msg = f'{pattern} is a gradient: give the run a loss, e.g. backward="logits[:, -1].var()".'
        raise InputError(msg)


def _loss(backward: str | Callable[[Any], Any] | LossSource | None) -> LossSource | None:
    from flexmagic.engine.loss import LossSource

    if backward is None or isinstance(backward, LossSource):
        return backward
    return LossSource(function=backward) if callable(backward) else LossSource(_checked(backward))


def _checked(text: str) -> str:
    try:
        compile(text.strip(), "<backward>", "eval")
    except SyntaxError as error:
        msg = f"The loss {text!r} is no expression: {error.msg}."
        raise InputError(msg) from None
    return text
