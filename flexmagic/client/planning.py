"""Which hooks act and what is captured in one run, spelled out for the engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flexmagic.client.hooks import exact_sites, sites_at
from flexmagic.errors import InputError
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.client.hooks import Hook
    from flexmagic.client.model import Model
    from flexmagic.engine.captures import RunKey
    from flexmagic.engine.runtime import RunPlan


def plan(
    model: Model,
    hooks: Sequence[Hook],
    patterns: Sequence[Site],
    *,
    key: RunKey,
    seed: int,
    grad: bool,
    backward: str | Callable[[Any], Any] | None,
) -> tuple[RunPlan, dict[Site, str]]:
    """The run's plan, and for each site the hooks after which it is captured.

    Raises :class:`~flexmagic.errors.InputError` for gradients asked of a run without a loss.
    """
    from flexmagic.engine.loss import LossSource
    from flexmagic.engine.runtime import RunPlan

    capture = [
        s for s, rule in model.rules.items() if s.path == "" and s.port == "output" and not rule.refused
    ]
    for pattern in patterns:
        _check_loss(pattern, backward)
        capture += [site for site in sites_at(model, pattern) if not model.rules[site].refused]
    acting, acted = [], dict[Site, str]()
    for hook in hooks:
        source = hook.current.source
        wanted = [p for p in hook.current.patterns if backward is not None or not p.is_gradient]
        sites = exact_sites(model, wanted, source)
        capture += [site for site in sites if not model.rules[site].refused]
        if not source.captures_only and sites:
            acting.append((source.name, source.version, sites))
            for site in sites:
                after = f"{source.name} v{source.version}"
                acted[site] = f"{acted[site]}, {after}" if site in acted else f"after {after}"
    loss = None
    if backward is not None:
        loss = LossSource(function=backward) if callable(backward) else LossSource(_checked(backward))
    owner, number = key
    with_grad = grad or backward is not None
    made = RunPlan(owner, number, seed, tuple(acting), tuple(dict.fromkeys(capture)), with_grad, loss)
    return made, acted


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
