"""The frozen results, and the table of them that stands in the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .cells import MODELS, STRATEGIES, Cell, Strategy

RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).parents[3] / "README.md"
START, END = "<!-- matrix -->", "<!-- end matrix -->"
_HEADS = {
    "Llama": "Llama (shipped)",
    "Mixtral": "mixture of experts",
    "by hand": "`nn.Module` with odd outputs",
    "BERT": "encoder (BERT)",
}


def results() -> dict[str, dict[str, Any]]:
    """What was measured last, by the cells' names."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def refused(frozen: dict[str, Any]) -> dict[str, str]:
    """The reasons of a cell's refused sites, layer numbers starred."""
    return {site: reason for reason, sites in frozen["refused"].items() for site in sites}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown: a row per strategy, a column per model, notes below."""
    notes: dict[str, str] = {}
    lines = [
        "| | ranks | " + " | ".join(_HEADS.get(model, model) for model in MODELS) + " |",
        "|---|---|" + "---|" * len(MODELS),
    ]
    for strategy in STRATEGIES:
        cells = [_cell(strategy, column, found, notes) for column in MODELS]
        lines.append(f"| {strategy.name} | {strategy.ranks} | " + " | ".join(cells) + " |")
    lines += ["", *(f"<sup>{mark}</sup> {note}  " for note, mark in notes.items())]
    return "\n".join(lines)


def _cell(strategy: Strategy, column: str, found: dict[str, dict[str, Any]], notes: dict[str, str]) -> str:
    cell = Cell(strategy, column)
    if column not in strategy.columns:
        return f"– {_mark(notes, cell.why_not())}"
    frozen = found.get(cell.name)
    if frozen is None:
        return "?"
    text = str(frozen["right"])
    if cell.model != column:
        text += f" {_mark(notes, f'the model has {cell.model}')}"
    if frozen["refused sites"]:
        marks = [_mark(notes, f"refused: {reason}") for reason in frozen["refused"]]
        text += f" + {frozen['refused sites']} {''.join(marks)}"
    return text


def _mark(notes: dict[str, str], note: str) -> str:
    mark = notes.setdefault(note, chr(ord("a") + len(notes)) if len(notes) < 26 else str(len(notes)))
    return f"<sup>{mark}</sup>"


def readme_with(text: str) -> str:
    """The README with a text between the matrix's markers."""
    whole = README.read_text(encoding="utf-8")
    before, _, rest = whole.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{text}\n\n{END}{after}"
