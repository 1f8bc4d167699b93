"""The part that needs an NVIDIA card: retrieval and edits there, in bf16."""

from __future__ import annotations

from pathlib import Path

import torch

from suite.forward import on_all
from suite.models import llama
from suite.on_ranks import Work
from suite.pairs import ratio
from suite.report import Report, Row


def cuda_rows(report: Report, folder: Path, rounds: int) -> None:
    """One rank on the card: retrieval beside plain hooks, in bf16. Without a card, says so."""
    if not torch.cuda.is_available():
        report.note("CUDA: no NVIDIA card here, not run")
        return
    from flexmagic import Session

    with Session.start(1) as session:
        session.load(llama(folder, width=1024), tp=1, dtype="bfloat16")
        sites = tuple(f"model.layers.{n}.mlp.up_proj" for n in range(8))
        for edit in (False, True):
            found = on_all(session, Work(sites, 4096, 8, 256, rounds, edit, rivals=()))
            what = f"CUDA, bf16, one rank: {'edit' if edit else 'retrieve'} at every MLP mid-activation"
            value = ratio(found.times, "flexmagic", "plain hooks")
            report.add(
                Row("CUDA", what, "plain torch hooks", value, "" if edit else "<= 1.03", rounds=rounds)
            )
