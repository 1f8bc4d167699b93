"""Turns between threads and between processes."""

import subprocess
import sys
import threading

import pytest

from flexmagic.client.turns import Turns, _taken

HOLDS = """
import sys
from pathlib import Path
from flexmagic.client.turns import Turns
with Turns(Path(sys.argv[1])).turn():
    print("have it", flush=True)
    sys.stdin.readline()
    Path(sys.argv[2]).write_text("was here")
"""


@pytest.fixture
def other(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "turn"), str(tmp_path / "mark")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "have it\n"
    yield process
    process.kill()
    process.communicate()


def test_what_another_process_does_in_its_turn_is_done_when_ours_comes(other, tmp_path):
    seen = []

    def wait():
        with Turns(tmp_path / "turn").turn():
            seen.append((tmp_path / "mark").read_text())

    thread = threading.Thread(target=wait)
    thread.start()
    with (tmp_path / "turn").open("a") as lock:
        assert not _taken(lock.fileno())
    assert not seen
    other.stdin.write("\n")
    other.stdin.flush()
    thread.join()
    assert seen == ["was here"]


def test_a_process_that_is_killed_gives_its_turn_back(other, tmp_path):
    other.kill()
    with Turns(tmp_path / "turn").turn():
        assert not (tmp_path / "mark").exists()


def test_a_turn_may_be_taken_within_itself_and_is_given_back_once(tmp_path):
    turns = Turns(tmp_path / "turn")
    with (tmp_path / "turn").open("a") as lock:
        with turns.turn():
            with turns.turn():
                assert not _taken(lock.fileno())
            assert not _taken(lock.fileno())
        assert _taken(lock.fileno())


def test_a_turn_that_ends_with_an_error_is_given_back(tmp_path):
    turns = Turns(tmp_path / "turn")
    with pytest.raises(KeyError), turns.turn():
        raise KeyError
    with (tmp_path / "turn").open("a") as lock:
        assert _taken(lock.fileno())


def test_threads_of_one_notebook_take_turns_too(tmp_path):
    turns, inside, most = Turns(tmp_path / "turn"), [], []

    def work():
        for _ in range(50):
            with turns.turn():
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 150
    assert set(most) == {1}


def test_who_waits_for_another_process_can_do_something_meanwhile_and_give_up(other, tmp_path):
    calls = []

    def meanwhile():
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Turns(tmp_path / "turn").turn(meanwhile):
        pytest.fail("it is not our turn")
    assert calls == [0, 1, 2]
