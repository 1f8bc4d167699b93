"""What a user should know after a run that went well: what is legal, but may surprise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flexmagic.client.table import size_text

if TYPE_CHECKING:
    from flexmagic.client.planning import Acting
    from flexmagic.engine.captures import Room
    from flexmagic.engine.outcome import Outcome
    from flexmagic.engine.runtime import RunReply
    from flexmagic.layout.sites import Site

SLOW = 1.0
"""Seconds that a hook's code may take in a run before it is worth a word, if that is most of the run."""

NEAR = 0.8
"""The part of the budget for captures from which on it is worth a word."""


def notes(hooks: Sequence[Acting], replies: Sequence[Sequence[RunReply]], *, cut: bool = False) -> list[str]:
    """One sentence for each hook that did not run, or not at all of its sites, or was slow or of two minds.

    ``replies``: each rank's, one for each step. ``cut``: parts of the model were not to run, so that
    only hooks that did nothing at all are worth a word.
    """
    by_rank = [[reply.outcome for reply in of_rank] for of_rank in replies]
    outcomes = [outcome for of_rank in by_rank for outcome in of_rank]
    reached = {site for outcome in outcomes for site, calls in outcome.calls.items() if calls}
    ran = {edit.hook for outcome in outcomes for edit in outcome.edits if edit.ran}
    said = [text for hook in hooks for text in _note(hook, reached, ran, len(by_rank[0]), cut=cut)]
    return [*said, *_slow(replies), *_of_two_minds(by_rank)]


def _slow(replies: Sequence[Sequence[RunReply]]) -> Iterator[str]:
    """The hooks whose code took most of a run."""
    whole = max(sum(reply.seconds for reply in of_rank) for of_rank in replies)
    spent: dict[str, float] = {}
    for of_rank in replies:
        mine: dict[str, float] = {}
        for reply in of_rank:
            for hook, seconds in reply.outcome.seconds.items():
                mine[hook] = mine.get(hook, 0.0) + seconds
        spent = {hook: max(spent.get(hook, 0.0), mine.get(hook, 0.0)) for hook in spent | mine}
    for hook, seconds in spent.items():
        if seconds >= SLOW and seconds > whole / 2:
            yield f"hook {hook!r} was slow: its code took {seconds:.1f} s of the run's {whole:.1f} s."


def _of_two_minds(by_rank: Sequence[Sequence[Outcome]]) -> Iterator[str]:
    """The hooks on whole tensors that printed something else on some ranks where they ran."""
    from flexmagic.engine.screen import alike

    where: dict[tuple[str, str], dict[int, str]] = {}
    for rank, outcomes in enumerate(by_rank):
        for edit in (edit for outcome in outcomes for edit in outcome.edits if edit.ran and not edit.local):
            where.setdefault((edit.hook, edit.site), {})[rank] = ""
        for site, hook, text in (printed for outcome in outcomes for printed in outcome.printed):
            if rank in where.get((hook, site), ()):
                where[hook, site][rank] += alike(text)
    odd: dict[str, str] = {}
    for (hook, site), texts in where.items():
        if len(set(texts.values())) > 1:
            odd.setdefault(hook, site)
    for hook, site in odd.items():
        yield (
            f"hook {hook!r} printed different things on the ranks at {site}, though all have the same tensor "
            "there: does it use `rank`, a clock, or what else differs between them?"
        )


class RoomNotes:
    """Says once that captures come near their budget, and once that they went over it."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def notes(self, rooms: Sequence[Room]) -> list[str]:
        """What there is to say of the ranks' captures after a run."""
        rank, room = max(enumerate(rooms), key=lambda pair: pair[1].held / max(pair[1].budget, 1))
        evicted = next((room.evicted for room in rooms if room.evicted), ())
        near = room.held >= NEAR * room.budget
        if not near and not evicted:
            self._said.clear()
            return []
        kind = "evicted" if evicted else "near"
        if kind in self._said:
            return []
        self._said |= {"near", kind}
        more = "Capture less, run.release() what you are done with, or %flexcluster limit --captures SIZE."
        if evicted:
            gone = ", ".join(map(str, evicted))
            return [f"The captures of run {gone} were dropped to make room for this one's. {more}"]
        size, most = size_text(room.held), size_text(room.budget)
        return [f"Captures on rank {rank} hold {size} of {most}; beyond, the oldest runs lose theirs. {more}"]


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
