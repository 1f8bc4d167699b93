"""The file that names a cluster's processes: what one process writes does not undo what another wrote."""

import json
import logging
import subprocess
import sys
import threading

import pytest

from flexmagic.client.cluster_file import SharedCluster
from flexmagic.client.running_clusters import found_running


@pytest.fixture
def process():
    """Starts processes that wait; they are ended and gone at the end."""
    made = []

    def start():
        made.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        return made[-1]

    yield start
    for one in made:
        end(one)


def end(process):
    process.kill()
    process.wait()
    process.stdin.close()


@pytest.fixture
def file(tmp_path, process, monkeypatch):
    """The file of a cluster with a controller and rank 0; every reader makes an object of its own of it."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    path = tmp_path / "profile_default" / "security" / "cluster-flexmagic-x.json"
    path.parent.mkdir(parents=True)
    whole = SharedCluster(cluster_id="flexmagic-x", profile_dir=str(path.parents[1])).to_dict()
    controller = process().pid
    whole["controller"] = {"class": "Local", "state": {"pid": controller, "identifier": "c"}}
    whole["engines"]["sets"] = {"rank0of2": engine_set(process().pid)}
    path.write_text(json.dumps(whole))
    return path


def engine_set(pid):
    return {"n": 1, "engines": {"0": {"pid": pid, "identifier": "e"}}}


def read(path):
    return SharedCluster.from_file(str(path), log=logging.getLogger("quiet"))


def sets_in(path):
    return json.loads(path.read_text())["engines"]["sets"]


def put(path, name, pid):
    """What another process has written after ours has read the file."""
    whole = json.loads(path.read_text())
    whole["engines"]["sets"][name] = engine_set(pid)
    path.write_text(json.dumps(whole))


def test_what_another_started_stays_in_the_file(file, process):
    ours = read(file)
    assert list(ours.engines) == ["rank0of2"]
    rank1 = process()
    put(file, "rank1of2", rank1.pid)
    ours.update_cluster_file()
    assert set(sets_in(file)) == {"rank0of2", "rank1of2"}
    assert list(ours.engines) == ["rank0of2"]
    end(rank1)
    ours.update_cluster_file()
    assert set(sets_in(file)) == {"rank0of2"}, "an engine that has ended leaves it"


def test_an_engine_that_another_replaced_is_the_one_in_the_file(file, process):
    ours = read(file)
    old = ours.engines["rank0of2"].launchers["0"].pid
    assert sets_in(file)["rank0of2"]["engines"]["0"]["pid"] == old
    new = process()
    put(file, "rank0of2", new.pid)
    ours.update_cluster_file()
    assert sets_in(file)["rank0of2"]["engines"]["0"]["pid"] == old, "ours is at work"
    put(file, "rank0of2", new.pid)
    ours.engines["rank0of2"].launchers["0"].process.kill()
    ours.engines["rank0of2"].launchers["0"].process.wait()
    ours.update_cluster_file()
    assert sets_in(file)["rank0of2"]["engines"]["0"]["pid"] == new.pid


def test_it_is_read_as_this_kind_and_never_half(file):
    (found,) = found_running().values()
    assert type(found) is SharedCluster
    over, broken = threading.Event(), []

    def look():
        while not over.is_set():
            try:
                json.loads(file.read_text())
            except ValueError as error:
                broken.append(error)

    reader = threading.Thread(target=look)
    reader.start()
    writers = [threading.Thread(target=lambda: [found.write_cluster_file() for _ in range(50)]) for _ in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    over.set()
    reader.join()
    assert not broken
    assert not list(file.parent.glob("*.new"))


def test_without_a_file_it_is_ipyparallels_own():
    cluster = SharedCluster(cluster_id="flexmagic-y", cluster_file="")
    assert cluster.to_dict()["engines"]["sets"] == {}
