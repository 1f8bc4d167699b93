"""From the JSON of a measurement to the README: a table of its rows and a chart, between two marks.

python -m suite.chart results.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from suite.report import PARTS, number

ROOT = Path(__file__).parents[3]
PICTURE = Path("demo_notebooks") / "images" / "speed.svg"
BEGIN, END = "<!-- speed -->", "<!-- end speed -->"
MET, MISSED, PLAIN = "#1a7f37", "#cf222e", "#57606a"
WIDTH, LEFT, LINE = 920, 470, 22


def chart(rows: list[dict[str, Any]]) -> str:
    """The rows with a target as an SVG: how far each median is from its target, and its quartiles."""
    wanted = [row for row in rows if row["target"] and row["unit"] == "×" and not row["undecided"]]
    height = LINE * (len(wanted) + 3)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12"><title>flexmagic beside its baselines</title>'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
        f'<text x="{_x(0)}" y="16" text-anchor="middle" fill="{PLAIN}">target</text>'
        f'<text x="{WIDTH - 8}" y="16" text-anchor="end" fill="{PLAIN}">better →</text>'
        f'<line x1="{_x(0)}" x2="{_x(0)}" y1="22" y2="{height - LINE}" stroke="{PLAIN}" '
        'stroke-dasharray="3 3"/>'
    )
    parts = [head]
    for at, row in enumerate(wanted):
        y = LINE * (at + 2)
        colour = MET if row["met"] else MISSED
        middle, low, high = (_x(_better(row, row["value"][key])) for key in ("median", "low", "high"))
        label = f"({row['part']}) {row['what']} / {row['against']}"
        said = f"{number(row['value']['median'])}× ({row['target'].replace('<=', '≤').replace('>=', '≥')})"
        parts.append(
            f'<text x="8" y="{y}" fill="#1f2328" font-size="10">{_cut(label)}</text>'
            f'<line x1="{low}" x2="{high}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2"/>'
            f'<circle cx="{middle}" cy="{y - 4}" r="4" fill="{colour}"/>'
            f'<text x="{WIDTH - 8}" y="{y}" text-anchor="end" fill="{colour}">{said}</text>'
        )
    parts.append("</svg>\n")
    return "".join(parts).replace("<=", "≤").replace(">=", "≥")


def _better(row: dict[str, Any], value: float) -> float:
    """How many doublings a value is on the good side of its target."""
    sign, target = row["target"].split()
    if not value > 0 or math.isnan(value):
        return 3.0 if sign == "<=" else -3.0
    found = math.log2(value / float(target))
    return max(-3.0, min(3.0, -found if sign == "<=" else found))


def _x(doublings: float) -> float:
    return round(LEFT + 190 + doublings * 60, 1)


def _cut(text: str) -> str:
    text = text.replace("&", "&amp;")
    return text if len(text) <= 88 else f"{text[:87]}…"


def table(found: dict[str, Any]) -> str:
    """All rows in Markdown, and where they were measured."""
    lines = ["| | what | beside | median | quartiles | target | rounds |", "|---|---|---|---|---|---|---|"]
    for row in found["rows"]:
        value, target = row["value"], row["target"].replace("<=", "≤").replace(">=", "≥")
        said = {None: target and f"{target} ?", True: f"{target} ✓", False: f"**{target} missed**"}[
            row["met"]
        ]
        spread = f"{number(value['low'])} – {number(value['high'])}"
        unit = row["unit"]
        known = not math.isnan(value["median"])
        middle = f"{number(value['median'])} {unit}" if known else ""
        cells = [row["part"], row["what"], row["against"], middle, spread if known else "", said]
        lines.append(f"| {' | '.join(cells)} | {row['rounds']} |")
    where = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
    blocks = ["\n".join(lines), *(_extra(title, rows) for title, rows in found["tables"].items())]
    blocks += [f"Measured on: {where}. {found['machine']}", "\n".join(f"- {note}" for note in _notes(found))]
    return "\n\n".join(blocks)


def _extra(title: str, rows: list[list[str]]) -> str:
    head, *others = rows
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *others)]
    return "\n".join([f"{title}:", "", *lines])


def _notes(found: dict[str, Any]) -> list[str]:
    """What is true of this run: what was not measured, broke off, could not be decided or was not run."""
    met = [row["met"] for row in found["rows"] if row["target"]]
    notes = [f"{met.count(True)} targets met, {met.count(False)} missed, {met.count(None)} not decidable."]
    absent = [letter for letter in PARTS if letter not in found["measured"]]
    if absent:
        notes.append(f"Not measured in this run: {', '.join(f'({letter})' for letter in absent)}.")
    notes += found["failed"]
    notes += [
        f"({row['part']}) {row['what']}: not decidable beside {row['against']}: {row['undecided']}."
        for row in found["rows"] if row["undecided"]
    ]  # fmt: skip
    minutes = sum(found["took"].values()) / 60
    return [*notes, *found["notes"], f"The whole took {minutes:.0f} minutes."]


def put(found: dict[str, Any], root: Path) -> None:
    """Write the chart, and all that stands between the marks of the README."""
    (root / PICTURE).write_text(chart(found["rows"]), encoding="utf-8")
    readme = root / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    picture = f"![Each row with a target: how far its median is from it, and its quartiles]({PICTURE})"
    middle = f"\n\n{picture}\n\n<details><summary>All rows</summary>\n\n{table(found)}\n\n</details>\n\n"
    readme.write_text(before + BEGIN + middle + END + rest.split(END)[1], encoding="utf-8")


def main() -> int:
    """Write a measurement into this repository's README."""
    put(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
