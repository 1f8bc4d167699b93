"""What is known of a place in the model, as a few lines of text: for those who point at its name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from flexmagic.errors import FlexError
from flexmagic.layout.sites import Site

if TYPE_CHECKING:
    from flexmagic.client.hooks import Hook
    from flexmagic.client.model import Model
    from flexmagic.layout.rule import Rule

MOST = 12
"""The most lines of one kind on a card."""


def site_card(model: Model, hooks: Iterable[Hook], text: str) -> str | None:
    """Class, sites with whole shape and layout, parameters and hooks of what a name or pattern means.

    ``None`` for a text that names nothing in this model. Asks no engine.
    """
    try:
        pattern = Site.parse(text)
    except FlexError:
        return None
    paths = [path for path in model.paths if Site(pattern.path).matches(Site(path))]
    if not paths:
        return None
    first = paths[0]
    several = f"{text}: {len(paths)} modules, of which the first is " if len(paths) > 1 else ""
    lines = [f"{several}{first or 'the model itself'}: {model.kinds[first]}"]
    lines += _some([_site(site, rule) for site, rule in model.rules.items() if site.path == first])
    if not model.surveyed:
        lines.append("  its sites are surveyed in the first run")
    lines += _some(
        [_parameter(model, name) for name in model.names(Site("", "grad")) if _within(name, first)]
    )
    lines += _some([_hook(hook) for hook in hooks if _is_at(hook, first)])
    return "\n".join(lines)


def _site(site: Site, rule: Rule) -> str:
    told = f"refused: {rule.refused}" if rule.refused else f"{rule.describe()} ({rule.how})"
    return f"  :{site.port}{site.leaf} {told}"


def _parameter(model: Model, name: str) -> str:
    shape, dtype = model.parameter_form(name)
    return f"  {name} {'whole shape not known' if shape is None else list(shape)} {dtype}"


def _hook(hook: Hook) -> str:
    return f"  hook {hook.name!r} v{hook.version}, {hook.state}"


def _within(name: str, path: str) -> bool:
    """Whether a parameter belongs to a module or to what is inside of it."""
    return not path or name.startswith(f"{path}.")


def _is_at(hook: Hook, path: str) -> bool:
    return any(Site(pattern.path).matches(Site(path)) for pattern in hook.current.patterns)


def _some(lines: Sequence[str]) -> list[str]:
    left = len(lines) - MOST
    return [*lines[:MOST], f"  … and {left} more"] if left > 0 else list(lines)
