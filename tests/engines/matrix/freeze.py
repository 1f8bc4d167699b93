"""Measure the matrix, freeze what came out, and write the table into the README.

Run in ``tests``: ``python -m engines.matrix.freeze [--grow] [part of a cell's name …]``. A cell that
refuses a site it did not refuse before is not taken over without ``--grow``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from flexmagic import Session

from .cells import CELLS, Cell
from .measure import OneProcess, compare_edits, measure
from .table import README, RESULTS, readme_with, refused, results, table


def main(arguments: list[str]) -> int:
    """Measure the cells that are named, or all; 1 if one is wrong or refuses more than before."""
    torch.set_num_threads(1)
    names = [argument for argument in arguments if argument != "--grow"]
    chosen = [cell for cell in CELLS if not names or any(name in cell.name for name in names)]
    kept = {cell.name: results()[cell.name] for cell in CELLS if cell.name in results()}
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({cell.strategy.ranks for cell in chosen}):
            with Session.start(ranks, oversubscribe=True) as session:
                here = [cell for cell in chosen if cell.strategy.ranks == ranks]
                grow = "--grow" in arguments
                bad += [c.name for c in here if not _take(session, c, Path(folder), kept, grow=grow)]
    ordered = {cell.name: kept[cell.name] for cell in CELLS if cell.name in kept}
    RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    README.write_text(readme_with(table(ordered)), encoding="utf-8")
    for name in bad:
        print(f"not taken over: {name}")
    return int(bool(bad))


def _take(session, cell: Cell, folder: Path, kept: dict, *, grow: bool) -> bool:
    one = OneProcess(cell, folder)
    cell.load(session, folder)
    found = measure(session, one)
    edits, wrong_edits = compare_edits(session, one, cell)
    wrong = found.wrong | wrong_edits
    print(f"{cell.name}: {found.right} right, {found.refused_sites} refused, {len(wrong)} wrong", flush=True)
    for site, how in wrong.items():
        print(f"  {site}: {how}")
    known = set(refused(kept[cell.name])) if cell.name in kept else set(found.refused)
    more = set(found.refused) - known
    for site in sorted(more):
        print(f"  {site}: refused now: {found.refused[site]}")
    if wrong or (more and not grow):
        return False
    kept[cell.name] = found.frozen(edits)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
