"""How the suite counts: ratios, targets, the chart."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from suite import growth, machine, rivals
from suite.chart import BEGIN, END, PICTURE, put
from suite.machine import Bystanders
from suite.pairs import Slow, Spread, in_turn, overhead, ratio
from suite.report import RED, Report, Row


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


def test_what_is_slow_takes_part_in_as_many_rounds_as_there_is_time_for():
    slow = Slow(frozenset({"slow"}), seconds=100, least=3)
    assert slow.rounds({"fast": 1.0, "slow": 10.0}, 20) == 8
    assert slow.rounds({"fast": 4.0, "slow": 10.0}, 20) == 3
    assert slow.rounds({"fast": 1.0, "slow": 2.0}, 20) == 20
    times = in_turn(
        {"fast": lambda: 1.0, "slow": lambda: 2.0}, 6, slow=Slow(frozenset({"slow"}), -1.0, least=2)
    )
    assert {name: len(taken) for name, taken in times.items()} == {"fast": 6, "slow": 2}
    assert ratio(times, "slow", "fast") == Spread(2, 2, 2)


NOISE = {"raw": [1.0, 1.1, 1.0, 1.0, 1.1], "again": [1.1, 1.0, 1.1, 1.1, 1.0], "ours": [1.25] * 5}


def test_what_is_added_is_compared_where_it_is_more_than_noise():
    share = overhead({**NOISE, "theirs": [1.45] * 5}, "ours", "theirs", "raw", "again")
    assert share.value.median == pytest.approx(0.5)
    assert not share.undecided
    share = overhead({**NOISE, "theirs": [1.06, 1.06, 1.06, 1.08, 1.0]}, "ours", "theirs", "raw", "again")
    assert math.isnan(share.value.median)
    assert "noise is 50 ms" in share.undecided
    share = overhead({**NOISE, "theirs": [1.45, 1.45, 1.45, 1.45, 0.9]}, "ours", "theirs", "raw", "again")
    assert share.value.high == pytest.approx(0.5)  # the one round in which they add nothing counts against us
    assert max(share.value.median, share.value.low) == pytest.approx(0.5)


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


def test_the_readme_holds_what_was_measured_and_nothing_else(tmp_path):
    report = Report()
    report.add(Row("a", "fast & good", "x", Spread(0.9, 0.8, 1.0), "<= 1.03", rounds=15))
    report.add(Row("d", "slow", "y", Spread(2, 1, 3), ">= 5", rounds=15))
    report.add(Row("c", "no target", "z", Spread(2, 1, 3), rounds=15))
    nothing = Spread(math.nan, math.nan, math.nan)
    report.add(Row("b", "unclear", "w", nothing, "<= 0.5", rounds=15, undecided="all is noise"))
    report.note("(e) other was not run: it is not there")
    report.put("Memory", ["what", "MB"], ["grid", "12"])
    report.fail("g", ValueError("no ranks"))
    report.write(tmp_path / "speed.json")
    found = json.loads((tmp_path / "speed.json").read_text())
    picture = tmp_path / PICTURE
    picture.parent.mkdir(parents=True)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nwritten by hand\n{END}\nafter\n")
    put(found, tmp_path)
    drawn, told = picture.read_text(), readme.read_text()
    assert drawn.count("<circle") == 2
    assert "fast &amp; good" in drawn
    assert "≥ 5" in drawn
    assert told.count("| 15 |") == 4
    assert "**≥ 5 missed**" in told
    assert "1 targets met, 1 missed, 1 not decidable" in told
    assert "not decidable beside w: all is noise" in told
    assert "was not run" in told
    assert "| grid | 12 |" in told
    assert "(g) broke off: ValueError: no ranks" in told
    assert "Not measured in this run: (e), (f), (g), (h)." in told
    assert "load average" in told
    assert told.startswith("before\n")
    assert told.endswith("\nafter\n")
    assert "by hand" not in told


def test_a_terminal_sees_misses_in_red(monkeypatch, capsys):
    row = Row("a", "this", "that", Spread(2, 2, 2), "<= 1")
    assert RED not in str(row)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert f"{RED}FAIL" in str(row)


def test_work_of_others_is_seen(monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    spent = {(1, "idle"): 3.0, (2, "busy"): 3.0}
    monkeypatch.setattr(machine, "_others", lambda: dict(spent))
    bystanders = Bystanders()
    assert bystanders.said().startswith("The machine was quiet")
    spent[2, "busy"] += 1000
    said = bystanders.said()
    assert said.startswith("THE MACHINE WAS LOADED")
    assert "(busy)" in said


def test_a_hook_of_baukits_kind_edits_and_retains():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    x = torch.ones(1, 2)
    with rivals.TraceDict(model, ("0",), lambda output, _name: output * 0) as traced:
        assert (model(x) == model[1].bias).all()
    assert (traced["0"].output == 0).all()
    assert not (model(x) == model[1].bias).all()


def test_what_grows_with_the_ranks_is_counted(monkeypatch):
    monkeypatch.setattr(growth, "SHAPE", (1, 164, 1064))
    report = Report()
    growth.growth_rows(report, 1, ranks=(2, 4, 8))
    assert [row.what.partition(":")[0] for row in report.rows] == [
        "a run with forty captured sites", "a look at a tile of 64 × 64", "statistics of the whole",
        "data of a look on 8 ranks",
    ]  # fmt: skip
    assert report.rows[-1].value.median == 1
    counted = {(row[0], row[1]): row[2:] for row in report.tables[growth.TITLE]}
    assert counted["a run with forty captured sites", "messages"] == ["4", "8", "16", "as ranks^1.00"]
    assert counted["statistics of the whole", "messages"] == ["2", "4", "8", "as ranks^1.00"]
