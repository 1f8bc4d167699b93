"""What a user should know after a run that went well: hooks that did nothing, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexmagic.client.planning import Acting
    from flexmagic.engine.outcome import Outcome
    from flexmagic.layout.sites import Site


def notes(
    hooks: Sequence[Acting], outcomes: Sequence[Outcome], steps: int, *, cut: bool = False
) -> list[str]:
    """One sentence for each hook that did not run, or not at all of its sites.

    ``outcomes``: of all ranks and steps, of which there were ``steps``. ``cut``: parts of the model
    were not to run, so that only hooks that did nothing at all are worth a word.
    """
    reached = {site for outcome in outcomes for site, calls in outcome.calls.items() if calls}
    ran = {edit.hook for outcome in outcomes for edit in outcome.edits if edit.ran}
    return [text for hook in hooks for text in _note(hook, reached, ran, steps, cut=cut)]


def _note(hook: Acting, reached: set[Site], ran: set[str], steps: int, *, cut: bool) -> Iterator[str]:
    name, limits = hook.source.name, hook.source.limits
    if hook.waits:
        if limits.every == 1:
            yield f"hook {name!r} did not act: {hook.waits}."
        return
    if limits.step is not None and not limits.step.among(steps):
        had = "one step, step 0" if steps == 1 else f"steps 0 to {steps - 1}"
        yield f"hook {name!r} did not act: it is for step {limits.step}, and this run had {had}."
        return
    absent = [site for site in hook.sites if site not in reached]
    acted = name in ran or hook.source.captures_only
    if limits.step is None and not limits.when and absent and (len(absent) == len(hook.sites) or not cut):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        what = "did not act" if len(absent) == len(hook.sites) else "did not act everywhere"
        yield f"hook {name!r} {what}: the run never reached {absent[0]}{more}."
    elif not acted and str(limits):
        yield f"hook {name!r} did not act: {limits} was never met."
