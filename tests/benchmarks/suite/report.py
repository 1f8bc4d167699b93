"""Rows of results: printed as a table with targets met or missed, and kept as JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from suite.machine import Bystanders, environment
from suite.pairs import Spread

RED, GREEN, YELLOW, GREY, PLAIN = "\033[31m", "\033[32m", "\033[33m", "\033[90m", "\033[0m"
PARTS = "abcdefgh"


@dataclass(frozen=True)
class Row:
    """One result. ``target``: ``"<= 1.03"`` or ``">= 5"``, empty where there is none.

    ``undecided``: why the numbers do not say whether the target is met.
    """

    part: str
    what: str
    against: str
    value: Spread
    target: str = ""
    unit: str = "×"
    rounds: int = 0
    undecided: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; ``None`` without one, or where that cannot be said."""
        if not self.target or self.undecided:
            return None
        sign, number = self.target.split()
        return self.value.median <= float(number) if sign == "<=" else self.value.median >= float(number)

    def __str__(self) -> str:
        """One line of the table."""
        said = {None: "    ", True: coloured("pass", GREEN), False: coloured("FAIL", RED)}[self.met]
        if self.undecided:
            said = coloured("?   ", YELLOW)
        spread = f"{number(self.value.low)} – {number(self.value.high)}"
        line = (
            f"{said} ({self.part}) {self.what:58.58} {self.against:34.34} "
            f"{number(self.value.median):>9}{self.unit:<3} {spread:>19} {self.target:>8}"
        )
        return f"{line}  not decidable: {self.undecided}" if self.undecided else line


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def coloured(text: str, colour: str) -> str:
    """Text in a colour where a person looks at it."""
    return f"{colour}{text}{PLAIN}" if sys.stdout.isatty() or os.environ.get("FORCE_COLOR") else text


@dataclass
class Report:
    """All rows, what was not run and why, and where it was measured.

    ``tables``: by title, a head and rows of text, of what is no ratio. ``took``: seconds of each part.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    bystanders: Bystanders = field(default_factory=Bystanders)

    def add(self, *rows: Row) -> None:
        """Print rows and keep them."""
        for row in rows:
            print(row, flush=True)
            self.rows.append(row)

    def note(self, text: str) -> None:
        """Say something that belongs to the results, such as what was not run."""
        print(coloured(f"     {text}", GREY), flush=True)
        self.notes.append(text)

    def fail(self, part: str, error: Exception) -> None:
        """Say that a part broke off; what it had measured before stays."""
        first = (str(error).strip().splitlines() or [""])[0][:200]
        text = f"({part}) broke off: {type(error).__name__}: {first}"
        print(coloured(text, RED), flush=True)
        self.failed.append(text)

    def put(self, title: str, head: list[str], row: list[str]) -> None:
        """Add a row to a table of its own, and print it."""
        if title not in self.tables:
            self.tables[title] = [head]
            print(f"{title}\n     {' | '.join(head)}")
        print(f"     {' | '.join(row)}", flush=True)
        self.tables[title].append(row)

    def keep_times(self, part: str, times: dict[str, list[float]]) -> None:
        """Keep the median seconds of each way, beside the ratios."""
        self.seconds.setdefault(part, {}).update({k: Spread.of(v).median for k, v in times.items()})

    def write(self, path: Path) -> None:
        """Everything as JSON."""
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        measured = "".join(letter for letter in PARTS if any(row.part == letter for row in self.rows))
        said = {
            "environment": environment(), "machine": self.bystanders.said(), "measured": measured,
            "rows": rows, "tables": self.tables, "notes": self.notes, "failed": self.failed,
            "seconds": self.seconds, "took": self.took,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def summary(self) -> str:
        """How many targets are met, missed and not decidable."""
        met = [row.met for row in self.rows if row.target]
        text = f"{met.count(True)} targets met, {met.count(False)} missed, {met.count(None)} not decidable"
        return coloured(text, RED if False in met else GREEN)
