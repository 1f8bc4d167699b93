"""Memory without a name that processes share, and the places in which ranks leave pieces for each other."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from flexmagic.engine.outboxes import LEFT, MOST, NEVER, NOT_YET, Outboxes
from flexmagic.engine.segments import Segment, machine, opened

OFFER = """
import os, sys
from flexmagic.engine.segments import TOKEN, machine
fd = os.memfd_create("flexmagic")
os.ftruncate(fd, (1 << 20) + TOKEN)
os.pwrite(fd, b"!" * TOKEN, 1 << 20)
print(machine(), os.getpid(), fd, sep="|", flush=True)
sys.stdin.read()
"""


def shared_here():
    return "memfd:flexmagic" in Path("/proc/self/maps").read_text()


def test_nothing_is_left_of_the_memory_of_a_process_that_was_killed():
    child = subprocess.Popen([sys.executable, "-c", OFFER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        where, pid, fd = child.stdout.readline().decode().strip().split("|")
        assert where == machine()
        segment = Segment(where, int(pid), int(fd), 1 << 20, b"!" * 16)
        assert opened(replace(segment, token=b"?" * 16)) == "it is another file"
        assert opened(replace(segment, nbytes=1 << 19)) == "it is another file"
        assert opened(replace(segment, machine="elsewhere")) is None
        memory = opened(segment)
        assert memory.shape == (1 << 20,)
        memory[:] = 7
        assert shared_here()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close()
        child.stdout.close()
    assert "cannot be opened" in opened(segment)
    assert int(memory.sum()) == 7 << 20  # what was opened stays until it is let go of
    del memory
    assert not shared_here()


def test_a_piece_is_left_once_there_is_room_for_it():
    own = Outboxes()
    assert own.leave(torch.zeros(8), 0) == NOT_YET
    assert own.leave(torch.zeros(8, device="meta"), 0) == NEVER
    assert own.leave(torch.empty(MOST + 1, dtype=torch.uint8), 0) == NEVER
    own.make(100, 0, lambda numbers: {0: numbers})
    x = torch.randn(3, 5).bfloat16()
    assert own.leave(x.T, 0) == LEFT
    assert torch.equal(own.pieces({0: (5, 3)}, x.dtype)[0], x.T)
    assert own.leave(torch.zeros(1 << 20), 0) == NOT_YET


def test_what_was_left_stays_until_all_have_told_something_else():
    own = Outboxes()
    own.make(100, 0, lambda numbers: {0: numbers})
    own.leave(torch.full((4,), 1.0), 0)
    first = own.pieces({0: (4,)}, torch.float32)[0]
    own.next()
    own.leave(torch.full((4,), 2.0), 0)
    assert first.tolist() == [1.0] * 4
    own.next()
    own.leave(torch.full((4,), 3.0), 0)
    assert first.tolist() == [3.0] * 4


def test_ranks_that_cannot_reach_each_other_never_try_again():
    own = Outboxes()
    own.make(100, 0, lambda numbers: {0: numbers, 1: torch.tensor([1, 2, 3, 4][: len(numbers)])})
    assert own.leave(torch.zeros(8), 0) == NEVER
