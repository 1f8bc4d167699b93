"""Rows of results: printed as a table with targets met or missed, and kept as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from suite.pairs import Spread

RED, GREEN, GREY, PLAIN = "\033[31m", "\033[32m", "\033[90m", "\033[0m"


@dataclass(frozen=True)
class Row:
    """One result. ``target``: ``"<= 1.03"`` or ``">= 5"``, empty where there is none."""

    part: str
    what: str
    against: str
    value: Spread
    target: str = ""
    unit: str = "×"
    rounds: int = 0

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the target; ``None`` without one."""
        if not self.target:
            return None
        sign, number = self.target.split()
        return self.value.median <= float(number) if sign == "<=" else self.value.median >= float(number)

    def __str__(self) -> str:
        """One line of the table."""
        said = {None: f"{GREY}    {PLAIN}", True: f"{GREEN}pass{PLAIN}", False: f"{RED}FAIL{PLAIN}"}[self.met]
        spread = f"{number(self.value.low)} – {number(self.value.high)}"
        return (
            f"{said} ({self.part}) {self.what:58.58} {self.against:34.34} "
            f"{number(self.value.median):>9}{self.unit:<3} {spread:>19} {self.target:>8}"
        )


def number(value: float) -> str:
    """Three digits that say something."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


@dataclass
class Report:
    """All rows, what was not run and why, and where it was measured."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, *rows: Row) -> None:
        """Print rows and keep them."""
        for row in rows:
            print(row, flush=True)
            self.rows.append(row)

    def note(self, text: str) -> None:
        """Say something that belongs to the results, such as what was not run."""
        print(f"{GREY}     {text}{PLAIN}", flush=True)
        self.notes.append(text)

    def keep_times(self, part: str, times: dict[str, list[float]]) -> None:
        """Keep the median seconds of each way, beside the ratios."""
        self.seconds.setdefault(part, {}).update({k: Spread.of(v).median for k, v in times.items()})

    def write(self, path: Path) -> None:
        """Everything as JSON."""
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        said = {"environment": environment(), "rows": rows, "notes": self.notes, "seconds": self.seconds}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Where and with what it was measured."""
    versions = {}
    for name in ("torch", "transformers", "numpy", "ipyparallel", "nnsight", "pyvene", "transformer_lens"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.machine(),
    )  # fmt: skip
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load before": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        **versions,
    }
