"""Which hooks act and what is captured in one run, spelled out for the engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexmagic.client.hooks import exact_sites, sites_at
from flexmagic.errors import InputError
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.client.hooks import Hook
    from flexmagic.client.model import Model
    from flexmagic.engine.captures import RunKey
    from flexmagic.engine.code import HookSource
    from flexmagic.engine.limits import Picks
    from flexmagic.engine.runtime import RunPlan


@dataclass(frozen=True)
class Acting:
    """A hook in one run, and the exact sites it is for; ``waits``: why it does not act in this one."""

    source: HookSource
    sites: tuple[Site, ...]
    waits: str = ""

    def __str__(self) -> str:
        """Name and version."""
        return f"{self.source.name} v{self.source.version}"


@dataclass(frozen=True)
class Planned:
    """A run as the engines get it, and the hooks in the order in which they act."""

    run: RunPlan
    hooks: tuple[Acting, ...]


def plan(
    model: Model,
    hooks: Sequence[Hook],
    patterns: Sequence[Site],
    *,
    key: RunKey,
    seed: int,
    grad: bool = False,
    backward: str | Callable[[Any], Any] | None = None,
) -> Planned:
    """A run's plan.

    Raises :class:`~flexmagic.errors.InputError` for gradients asked of a run without a loss.
    """
    from flexmagic.engine.loss import LossSource
    from flexmagic.engine.runtime import RunPlan

    capture = [
        s for s, rule in model.rules.items() if s.path == "" and s.port == "output" and not rule.refused
    ]
    at_steps: list[tuple[Site, Picks]] = []
    for pattern in patterns:
        _check_loss(pattern, backward)
        capture += [site for site in sites_at(model, pattern) if not model.rules[site].refused]
    owner, number = key[:2]
    acting = [_acting(model, hook, number, with_loss=backward is not None) for hook in hooks]
    for hook in acting:
        captured = [site for site in hook.sites if not model.rules[site].refused]
        steps = hook.source.limits.step
        if hook.source.captures_only and steps is not None:
            at_steps += [(site, steps) for site in captured]
        else:
            capture += captured
    loss = None
    if backward is not None:
        loss = LossSource(function=backward) if callable(backward) else LossSource(_checked(backward))
    run = RunPlan(
        owner,
        number,
        seed,
        tuple(
            (hook.source.name, hook.source.version, hook.sites)
            for hook in acting
            if hook.sites and not hook.waits and not hook.source.captures_only
        ),
        tuple(dict.fromkeys(capture)),
        tuple(at_steps),
        grad or backward is not None,
        loss,
    )
    return Planned(run, tuple(acting))


def _acting(model: Model, hook: Hook, number: int, *, with_loss: bool) -> Acting:
    """What a hook does in the run of a number."""
    source = hook.current.source
    wanted = [p for p in hook.current.patterns if with_loss or not p.is_gradient]
    waits = ""
    if not wanted:
        waits = "its sites are gradients, and this run has no loss"
    elif not source.limits.meets(number):
        waits = f"it acts in every {source.limits.every}. run, and this is run {number}"
    return Acting(source, exact_sites(model, wanted, source), waits)


def _check_loss(pattern: Site, backward: object) -> None:
    if pattern.is_gradient and backward is None:
        msg = f'{pattern} is a gradient: give the run a loss, e.g. backward="logits[:, -1].var()".'
        raise InputError(msg)


def _checked(text: str) -> str:
    try:
        compile(text.strip(), "<backward>", "eval")
    except SyntaxError as error:
        msg = f"The loss {text!r} is no expression: {error.msg}."
        raise InputError(msg) from None
    return text
