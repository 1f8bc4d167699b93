"""Rows (a) and (b): a forward with retrieval, and with edits, against the same forward in other hands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite import on_ranks
from suite.models import llama, views_of
from suite.on_ranks import WHOLE, Found, Work
from suite.pairs import Times, overhead, ratio
from suite.report import Report, Row

RIVALS = {
    "nnsight": "NNsight 0.8.1",
    "flexmodel": "FlexModel 0.1.0",
    "pyvene": "pyvene",
    "transformer_lens": "TransformerLens",
    "baukit": "baukit-style hooks",
}
LAYERS, WIDTH, BATCH, SEQ = 8, 128, 16, 64
"""Narrow and with many tokens: there what is exchanged weighs most beside what is computed."""

TIMES = 2
"""How many times the rounds of other rows these have: they are short."""


@dataclass(frozen=True)
class Sites:
    """Which modules, how they are called, and how wide what they give is."""

    paths: tuple[str, ...]
    words: str
    width: int


def sites(layers: int = LAYERS, width: int = WIDTH) -> tuple[Sites, Sites]:
    """Every decoder layer, and the middle of every MLP."""
    decoder = tuple(f"model.layers.{n}" for n in range(layers))
    middle = tuple(f"model.layers.{n}.mlp.up_proj" for n in range(layers))
    return (
        Sites(decoder, "every decoder layer", width),
        Sites(middle, "every MLP mid-activation", 4 * width),
    )


def forward_rows(
    report: Report, folder: Path, rounds: int, strategies: tuple[str, ...] = ("tp", "fsdp")
) -> None:
    """Measure on two ranks, by each strategy."""
    from flexmagic import Session

    path = llama(folder, layers=LAYERS, width=WIDTH)
    with Session.start(2, oversubscribe=True) as session:
        for strategy in strategies:
            session.load(path, **{strategy: 2})
            name = {"tp": "TP=2", "fsdp": "FSDP2=2", "dp": "DP=2"}[strategy]
            for edit in (False, True):
                for where in sites():
                    work = Work(where.paths, where.width, BATCH, SEQ, TIMES * rounds, edit, whole=edit)
                    tell(report, on_all(session, work), edit=edit, what=f"{where.words}, {name}")


def on_all(session: Any, work: Work) -> Found:
    """What rank 0 measured while all ranks ran the same."""
    views = views_of(session)
    pending = [view.apply_async(on_ranks.forward_rows, work) for view in views]
    return next(iter([answer.get() for answer in pending]))


def tell(
    report: Report, found: Found, *, edit: bool, what: str, rivals: tuple[str, ...] = ("nnsight", "flexmodel")
) -> None:
    """Rows of one kind of work: beside plain hooks, the raw forward and each rival."""
    times, part = found.times, "b" if edit else "a"
    verb = "edit" if edit else "retrieve"
    n = len(times["raw forward"])
    report.keep_times(f"{part}: {verb} at {what}", times)
    title = f"{verb} at {what}"
    plain = "" if edit else "<= 1.03"

    def row(text: str, beside: str, one: str, other: str, target: str = "") -> None:
        report.add(Row(part, text, beside, ratio(times, one, other), target, rounds=n))

    row(title, "plain torch hooks", "flexmagic", "plain hooks", plain)
    row(title, "raw forward", "flexmagic", "raw forward")
    through = f"{title}, through the whole"
    if WHOLE in times:
        row(through, "plain torch hooks", WHOLE, "plain hooks")
        row(through, "raw forward", WHOLE, "raw forward")
    for rival in rivals:
        words = RIVALS[rival]
        if rival == "nnsight" and edit and "DP" in what:
            report.note(f"(b) {title}: {words} has each rank edit its own rows only: not compared")
        elif rival not in times:
            report.note(f"({part}) {title}: {words} was not run: {found.absent.get(rival, 'not asked for')}")
        else:
            report.add(_beside(part, title, rival, times))
            if WHOLE in times:
                report.add(_beside(part, through, rival, times, ours=WHOLE))


def _beside(part: str, title: str, rival: str, times: Times, *, ours: str = "flexmagic") -> Row:
    """A row beside a rival: retrievals by their times, edits by what they add to a raw forward."""
    share, n = overhead(times, ours, rival, "raw forward", "raw again"), len(times["raw forward"])
    words, why = RIVALS[rival], share.undecided
    if part == "a":
        value = ratio(times, "flexmagic", rival)
        if rival == "baukit":  # those are plain hooks
            return Row(part, title, words, value, "<= 1.03", rounds=n)
        return Row(part, title, words, value, "<= 1", rounds=n, undecided=why)
    target = "<= 0.5" if "mid-activation" in title and "=" in title else ""
    words = f"overhead of {words}"
    return Row(part, f"{title}: overhead", words, share.value, target, rounds=n, undecided=why)
