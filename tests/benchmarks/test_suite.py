"""How the suite counts: ratios, targets, the chart."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from suite.chart import chart, table
from suite.pairs import Spread, in_turn, overhead, ratio
from suite.report import Report, Row


def test_ways_are_taken_in_turn_and_compared_round_by_round():
    taken = []

    def way(name, seconds):
        def run():
            taken.append(name)
            return seconds

        return run

    times = in_turn({"a": way("a", 3.0), "b": way("b", 2.0), "c": way("c", 1.0)}, 4)
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [tuple(taken[n : n + 3]) for n in range(3, 15, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert ratio(times, "a", "b") == Spread(1.5, 1.5, 1.5)
    assert overhead(times, "b", "a", "c").median == 0.5
    assert (
        overhead(times, "a", "c", "b").median != overhead(times, "a", "c", "b").median
    )  # the rival adds nothing


def test_a_spread_is_median_and_quartiles():
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3, 2, 4)


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        ("<= 1.03", 1.03, True),
        ("<= 1.03", 1.04, False),
        (">= 5", 5, True),
        (">= 5", 4.9, False),
        ("", 1, None),
    ],
)
def test_targets_are_met_or_missed_and_it_is_said(target, value, met, capsys):
    row = Row("a", "this", "that", Spread(value, value, value), target)
    assert row.met is met
    Report().add(row)
    said = capsys.readouterr().out
    assert ("FAIL" in said, "pass" in said) == (met is False, met is True)


def test_what_cannot_be_told_is_no_target_met():
    nothing = float("nan")
    assert Row("b", "this", "that", Spread(nothing, nothing, nothing), "<= 0.5").met is False


def test_the_chart_and_the_table_hold_every_row(tmp_path):
    report = Report()
    report.add(Row("a", "fast & good", "x", Spread(0.9, 0.8, 1.0), "<= 1.03", rounds=15))
    report.add(Row("d", "slow", "y", Spread(2, 1, 3), ">= 5", rounds=15))
    report.add(Row("c", "no target", "z", Spread(2, 1, 3), rounds=15))
    report.note("(e) other was not run: it is not there")
    report.write(tmp_path / "speed.json")
    import json

    found = json.loads((tmp_path / "speed.json").read_text())
    drawn = chart(found["rows"])
    assert drawn.count("<circle") == 2
    assert "fast &amp; good" in drawn
    assert "≥ 5" in drawn
    told = table(found)
    assert told.count("| 15 |") == 3
    assert "**≥ 5 missed**" in told
    assert "was not run" in told
