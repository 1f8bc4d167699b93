"""One error out of what the ranks report of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexmagic.engine.code import TRACE
from flexmagic.engine.outcome import Edit, Outcome
from flexmagic.engine.runtime import RunReply
from flexmagic.errors import CellError, FlexError, HookError, ModelError, RankFailure, StuckError
from flexmagic.layout.rule import Rule
from flexmagic.layout.sites import Site

READY = "The model and the engines are ready: mend the cell and run it again."

ON_THE_ENGINES = (
    "This code runs on the engines, where the notebook's variables are not: define the name there with %%px, "
    "or here in the code."
)
"""What to do about a name that is not known."""


def raise_for(replies: Sequence[RunReply], rules: Mapping[Site, Rule]) -> None:
    """Raise what went wrong in a run, if anything did; ``replies`` in rank order."""
    failures = tuple(f for reply in replies for f in reply.outcome.failures)
    if failures:
        raise HookError(f"{describe(failures, len(replies))}\n{READY}", failures)
    _raise_for_loss([reply.outcome.loss_failures for reply in replies])
    _raise_for_model(replies)
    _raise_for_stop([reply.outcome for reply in replies])
    _raise_for_edits([reply.outcome.edits for reply in replies], {str(s): r.ranks for s, r in rules.items()})


def last_reply(answer: Any) -> RunReply | None:
    """A rank's report of a run, or of the last step of a generation; ``None`` if there is none."""
    steps = getattr(answer, "steps", None)
    last = steps[-1] if steps else answer
    reply: RunReply | None = getattr(last, "reply", None)
    return reply


def model_error(answer: Any) -> str:
    """How the model's own forward failed on a rank, ``""`` if it did not."""
    reply = last_reply(answer)
    return "" if reply is None else reply.error


def raise_for_stuck(stuck: StuckError, world_size: int) -> None:
    """Raise what failed before the others waited in vain, if anything did.

    A failure on a rank that was freed out of a hook, or out of the model, is no cause but a consequence.
    """
    verdict = stuck.verdict
    found = {rank: last_reply(getattr(said, "value", None)) for rank, said in sorted(stuck.said.items())}
    replies = {rank: reply for rank, reply in found.items() if reply is not None}
    apart = {rank for rank, place in verdict.places.items() if place is None or place.hook}
    failures = tuple(
        f for rank in sorted(replies) if rank not in apart for f in replies[rank].outcome.failures
    )
    if failures:
        msg = f"{describe(failures, world_size)}\n{verdict.meanwhile}\n{stuck.after}"
        raise HookError(msg, failures) from stuck
    errors = {
        rank: replies[rank].error for rank in verdict.answered if rank in replies and replies[rank].error
    }
    if errors:
        msg = f"{_model_failure(errors, world_size)}\n{verdict.meanwhile}\n{stuck.after}"
        raise ModelError(msg) from stuck


def _raise_for_loss(said: Sequence[Sequence[str]]) -> None:
    """Say once what was wrong with a loss: all ranks heard of each other's failure before any went on."""
    texts = {rank: text for of_rank in said for rank, text in enumerate(of_rank) if text}
    if texts:
        where = "every rank" if len(texts) == len(said) else f"rank {_ranks(list(texts))}"
        msg = f"the loss could not be differentiated, on {where}: {next(iter(texts.values()))}"
        raise HookError(msg)


def _raise_for_model(replies: Sequence[RunReply]) -> None:
    errors = {rank: reply.error for rank, reply in enumerate(replies) if reply.error}
    if errors:
        raise ModelError(_model_failure(errors, len(replies)))


def _model_failure(errors: Mapping[int, str], world_size: int) -> str:
    where = "on every rank" if len(errors) == world_size else f"on rank {_ranks(sorted(errors))}"
    return f"The model's own forward failed {where}: {errors[min(errors)]}"


def _raise_for_stop(outcomes: Sequence[Outcome]) -> None:
    reasons = sorted({outcome.stopped for outcome in outcomes if outcome.stopped})
    if reasons:
        raise FlexError("The run was ended on all ranks together: " + "; ".join(reasons))


def _raise_for_edits(edits: Sequence[Sequence[Edit]], holders: Mapping[str, Sequence[int]]) -> None:
    """Compare what hooks left on the ranks that hold a site: a whole tensor must be edited alike there."""
    for site in dict.fromkeys(edit.site for of_rank in edits for edit in of_rank):
        ranks = holders.get(site, range(len(edits)))
        _raise_for_site([[e for e in edits[rank] if e.site == site and not e.local] for rank in ranks])


def _raise_for_site(edits: Sequence[Sequence[Edit]]) -> None:
    for per_rank in zip(*edits, strict=False):
        if len({(e.site, e.hook, e.edited, e.sums) for e in per_rank}) > 1:
            first = per_rank[0]
            msg = (
                f"hook {first.hook!r} left different values on the ranks at {first.site}, "
                "so the result would not be that of one model. A hook on whole tensors must do the same on "
                "every rank: do not branch on `rank`, and draw random numbers from torch. "
                "For a rank's own piece use --local."
            )
            raise HookError(msg)
    if len({len(of_rank) for of_rank in edits}) > 1:
        msg = (
            "the ranks did not run the same hooks the same number of times, "
            "so the result is not that of one model"
        )
        raise HookError(msg)


def cell_error(error: CellError, world_size: int) -> CellError:
    """A :class:`CellError` with a message that names ranks and the user's line."""
    stuck = error.__cause__
    meanwhile = f"\n{stuck.verdict.meanwhile}" if isinstance(stuck, StuckError) else ""
    return CellError(
        f"{describe(error.failures, world_size)}{meanwhile}\nNo model was changed.", error.failures
    )


def cell_failed(error: CellError, world_size: int) -> CellError:
    """The same for a cell that ran on a model that is there."""
    return CellError(f"{describe(error.failures, world_size)}\n{READY}", error.failures)


def describe(failures: Sequence[RankFailure], world_size: int) -> str:
    """What failed, where and on which ranks; the same failure on several ranks is said once."""
    groups: dict[tuple[object, ...], list[RankFailure]] = {}
    for f in failures:
        groups.setdefault((f.hook, f.site, f.step, f.line, f.kind, f.message), []).append(f)
    told = [_one(group, world_size) for group in groups.values()]
    others = sorted(set(range(world_size)) - {f.rank for f in failures})
    if others and failures[0].site:
        told.append(f"Rank {_ranks(others)} did not fail, and ended the run with the others.")
    return "\n".join(told)


def _one(group: list[RankFailure], world_size: int) -> str:
    f = group[0]
    ranks = sorted({failure.rank for failure in group})
    where = "every rank" if len(ranks) == world_size and world_size > 1 else f"rank {_ranks(ranks)}"
    who = "the trace" if f.hook == TRACE else f"hook {f.hook!r}"
    who = who if f.site or f.hook == TRACE else "the cell"
    what = f"{who} failed at {f.site}" if f.site else f"{who} failed"
    line = "" if f.line is None else f", line {f.line}"
    step = "" if f.step is None else f", step {f.step}"
    hint = f"\n{ON_THE_ENGINES}" if f.kind == "NameError" else ""
    return f"{what}{step}{line}, on {where}:{_quoted(f)}\n{f.kind}: {f.message}{hint}"


def _quoted(f: RankFailure) -> str:
    """The user's line, and below it what of it failed."""
    if not f.text.strip():
        return ""
    indent = len(f.text) - len(f.text.lstrip())
    quoted = f"\n    {f.text.strip()}"
    if f.columns is not None:
        start, end = f.columns
        quoted += f"\n    {' ' * (start - indent)}{'^' * (end - start)}"
    return quoted


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
