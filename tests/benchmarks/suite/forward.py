"""Rows (a) and (b): a forward with retrieval, and with edits, against the same forward in other hands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from suite import on_ranks
from suite.models import llama, views_of
from suite.on_ranks import Found, Work
from suite.pairs import least_overhead, overhead, ratio
from suite.report import Report, Row

RIVALS = {"nnsight": "NNsight 0.8.1 under %%px", "flexmodel": "FlexModel 0.1.0"}


def forward_rows(
    report: Report, folder: Path, rounds: int, strategies: tuple[str, ...] = ("tp", "fsdp")
) -> None:
    """Measure on two ranks, by each strategy."""
    from flexmagic import Session

    layers = 8
    path = llama(folder, layers=layers)
    with Session.start(2, oversubscribe=True) as session:
        for strategy in strategies:
            session.load(path, **{strategy: 2})
            decoder = [f"model.layers.{n}" for n in range(layers)]
            middle = [f"model.layers.{n}.mlp.up_proj" for n in range(layers)]
            name = {"tp": "TP=2", "fsdp": "FSDP2=2", "dp": "DP=2"}[strategy]
            for edit, sites, width, what in (
                (False, decoder, 512, "every decoder layer"),
                (False, middle, 2048, "every MLP mid-activation"),
                (True, decoder, 512, "every decoder layer"),
                (True, middle, 2048, "every MLP mid-activation"),
            ):
                found = on_all(session, Work(tuple(sites), width, 4, 64, rounds, edit))
                _tell(report, found, edit=edit, what=f"{what}, {name}")


def on_all(session: Any, work: Work) -> Found:
    """What rank 0 measured while all ranks ran the same."""
    views = views_of(session)
    pending = [view.apply_async(on_ranks.forward_rows, work) for view in views]
    return next(iter([answer.get() for answer in pending]))


def _tell(report: Report, found: Found, *, edit: bool, what: str) -> None:
    times, part = found.times, "b" if edit else "a"
    verb = "edit" if edit else "retrieve"
    n = len(times["raw forward"])
    report.keep_times(f"{part}: {verb} {what}", times)
    title = f"{verb} at {what}"
    plain = "" if edit else "<= 1.03"
    report.add(
        Row(part, title, "plain torch hooks", ratio(times, "flexmagic", "plain hooks"), plain, rounds=n)
    )
    report.add(Row(part, title, "raw forward", ratio(times, "flexmagic", "raw forward"), rounds=n))
    for rival, words in RIVALS.items():
        if rival == "nnsight" and edit and "TP" not in what:
            report.note(
                f"(b) {title}: {words} sees each rank's own rows only, which is other work; not compared"
            )
        elif rival not in times:
            report.note(f"({part}) {title}: {words} was not run: {found.absent.get(rival, 'not asked for')}")
        elif edit:
            target = "<= 0.5" if "mid-activation, TP" in what else ""
            beside = f"overhead of {words}"
            value = overhead(times, "flexmagic", rival, "raw forward")
            report.add(Row(part, f"{title}: overhead", beside, value, target, rounds=n))
            value = least_overhead(times, "flexmagic", rival, "raw forward")
            report.add(Row(part, f"{title}: overhead, fastest rounds", beside, value, rounds=n))
        else:
            report.add(Row(part, title, words, ratio(times, "flexmagic", rival), "<= 1", rounds=n))
