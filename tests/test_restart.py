"""Offers of clusters to the kernel that comes."""

import subprocess
import sys

import psutil
import pytest

from flexmagic.client import reaper
from flexmagic.client.restart import Offer, offers, take, taken


@pytest.fixture
def security(tmp_path):
    folder = tmp_path / "profile_default" / "security"
    folder.mkdir(parents=True)
    return folder


def test_an_offer_is_found_and_taken_by_its_own_kernel_only(security, tmp_path):
    offer = Offer("flexmagic-1", "kernel-a.json", "2 engines")
    path = offer.write(security)
    assert offers("kernel-a.json", tmp_path) == [offer]
    assert offers("kernel-b.json", tmp_path) == []
    assert not take(security, "flexmagic-1", "kernel-b.json")
    assert path.exists()
    assert take(security, "flexmagic-1", "kernel-a.json")
    assert not path.exists()
    assert not take(security, "flexmagic-1", "kernel-a.json")
    assert taken(path)


def test_an_offer_that_nobody_takes_is_withdrawn(security):
    path = Offer("flexmagic-1", "kernel-a.json", "2 engines").write(security)
    assert not taken(path, 0.0)
    assert not path.exists()


def test_a_damaged_offer_is_none(security, tmp_path):
    (security / "flexmagic-1.offer").write_text("{")
    (security / "flexmagic-2.offer").write_text('{"other": 1}')
    assert offers("kernel-a.json", tmp_path) == []
    assert not take(security, "flexmagic-1", "kernel-a.json")


@pytest.mark.parametrize("comes", [True, False])
def test_the_reaper_waits_for_the_kernel_that_comes(security, comes, monkeypatch):
    engine = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    cluster = security / "cluster.json"
    cluster.write_text(f'{{"engines": {{"sets": {{"a": {{"engines": {{"0": {{"pid": {engine.pid}}}}}}}}}}}}}')
    path = Offer("flexmagic-1", "kernel-a.json", "1 engine").write(security)
    code = (
        "import sys; from flexmagic.client import reaper, restart;"
        "reaper.taken = lambda path: restart.taken(path, 0.0);"  # nobody comes: it does not wait for long
        "reaper.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(cluster)], stdin=subprocess.PIPE)
    reaper.offer(process, path)
    if comes:
        path.unlink()
    process.stdin.close()  # what the end of the notebook's process does
    process.wait(30)
    if comes:
        assert psutil.pid_exists(engine.pid)
        assert engine.poll() is None
        engine.communicate(b"\n", timeout=30)
    engine.wait(30)
    assert (engine.returncode == 0) == comes
    assert cluster.exists() == comes


def test_what_lies_beside_a_clusters_file_goes_with_it_and_nothing_else(tmp_path):
    kept = ["cluster-other.json", "ipcontroller-other-client.json", "other.turn"]
    ours = [
        "cluster-mine.json",
        "ipcontroller-mine-client.json",
        "ipcontroller-mine-engine.json",
        "mine.turn",
    ]
    for name in [*kept, *ours]:
        (tmp_path / name).touch()
    reaper.forget(tmp_path / "cluster-mine.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    reaper.forget(tmp_path / "cluster-.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
