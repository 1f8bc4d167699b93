"""The scripts that measure run, and say what they are there to say; what they say of time is not tested."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def printed(script, *options):
    """What a script prints; it must not fail."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["tp", "fsdp", "pp"])
def test_no_rank_holds_more_than_its_part(strategy):
    said = printed("loading.py", "--gigabytes", "0.25", "--strategy", strategy)
    shares = [float(share) for share in re.findall(r"own parameters (\d\.\d+)", said)]
    assert len(shares) == 2
    assert sum(shares) >= 0.99
    assert max(shares) <= 0.6


@pytest.mark.full
def test_a_class_gets_what_is_right_and_leaves_nothing():
    said = printed("workshop.py", "--guests", "4", "--kernels", "1", "--minutes", "0.3", "--alone", "0.1")
    values, right, wrong = map(
        int, re.search(r"(\d+) values .* of (\d+) runs .* (\d+) runs wrong", said).groups()
    )
    assert values >= right > 4
    assert wrong == 0
    assert "refused or failed: 0" in said
    assert len(re.findall(r"memory of \w+: \d", said)) >= 3
    assert "0 processes" in said


@pytest.mark.full
def test_captures_add_no_collective():
    said = printed("retrieval.py", "--pairs", "2", "--batch", "1", "--seq", "8")
    counts = re.findall(r"\{'none': (\d+), 'plain': (\d+), 'captured': (\d+)\}", said)
    assert len(counts) == 2
    assert all(int(none) > 0 and none == plain == captured for none, plain, captured in counts)
    assert len(re.findall(r"captured / plain: \d", said)) == 2


@pytest.mark.full
def test_the_suite_says_what_is_met_and_what_was_not_run(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "suite", "--rows", "acdgh", "--rounds", "2", "--megabytes", "1",
            "--dry-card", "--json", str(tmp_path / "speed.json"),
        ],
        capture_output=True, text=True, check=False, cwd=HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "speed.json").read_text())
    assert {row["part"] for row in found["rows"]} == {*"abcdgh", "CUDA"}
    assert found["measured"] == "abcdgh"
    assert not found["failed"]
    assert len(found["tables"]) == 2
    assert found["environment"]["cores"] >= 1
    assert {row["met"] for row in found["rows"] if not row["target"]} == {None}
    assert all(isinstance(row["met"], bool) or row["undecided"] for row in found["rows"] if row["target"])


@pytest.mark.full
def test_opening_a_view_sends_what_is_visible():
    pytest.importorskip("selenium")
    if not all(any(map(shutil.which, names)) for names in (["chromium", "google-chrome"], ["chromedriver"])):
        pytest.skip("needs Chromium and its driver")
    options = ("--ranks", "2", "--large", "1024", "4096", "--small", "64", "128", "--repeat", "1")
    said = printed("viewer.py", *options)
    sent = [int(text.replace(",", "")) for text in re.findall(r": ([\d,]+) bytes to the browser", said)]
    assert len(sent) == 2
    assert 0 < max(sent) < 1_000_000
    assert int(re.search(r"saved: ([\d,]+)", said)[1].replace(",", "")) <= 1_000_000
    assert len(re.findall(r"(plotly|treescope): not run", said)) == 2
