"""Rows (a) and (b) in one process, where the libraries for one process can run the same work."""

from __future__ import annotations

from pathlib import Path

from suite.forward import BATCH, LAYERS, SEQ, TIMES, WIDTH, on_all, sites, tell
from suite.models import llama
from suite.on_ranks import Work
from suite.report import Report

RIVALS = ("nnsight", "pyvene", "transformer_lens", "baukit")


def single_rows(report: Report, folder: Path, rounds: int) -> None:
    """Measure on one engine that holds the whole model."""
    from flexmagic import Session

    path = llama(folder, layers=LAYERS, width=WIDTH)
    with Session.start(1, oversubscribe=True) as session:
        session.load(path, tp=1)
        for edit in (False, True):
            for where in sites():
                work = Work(
                    where.paths, where.width, BATCH // 2, SEQ, TIMES * rounds, edit, RIVALS, folder=str(path)
                )
                what = f"{where.words}, one process"
                tell(report, on_all(session, work), edit=edit, what=what, rivals=RIVALS)
