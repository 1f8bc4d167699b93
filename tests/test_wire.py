"""Pieces come whole and bit for bit, by shared memory or by messages, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexmagic.client import segments, wire
from flexmagic.client.wire import fetch, nbytes, stretches
from flexmagic.engine import look
from flexmagic.engine.segments import Segment, fill, machine, opened
from flexmagic.layout.assemble import Read, plan_read, split
from flexmagic.layout.layout import Layout, contiguous_spans
from flexmagic.layout.mesh import Mesh

SHAPE = (3, 40, 24)
INTERLEAVED = [((0, 4), (12, 20)), ((4, 12), (20, 24))]
CUTS = {"rows": (0, contiguous_spans([2, 1])), "columns": (2, INTERLEAVED), "nothing": (2, [((0, 24),)] * 2)}


def layout_of(cut, dtype):
    dim, spans = CUTS[cut]
    blocks = tuple(tuple(own if d == dim else ((0, n),) for d, n in enumerate(SHAPE)) for own in spans)
    return Layout(SHAPE, ("a", "b", "c"), str(dtype), Mesh(("tp",), (2,)), blocks)


def values(dtype):
    bits = torch.randint(0, 2 if dtype == torch.bool else 255, SHAPE, dtype=torch.uint8)
    return torch.cat([bits] * dtype.itemsize, -1).view(dtype)


class Ranks:
    """Ranks in this process that answer as engines do; ``machines``: where each says it is."""

    def __init__(self, layout, whole, machines=(None, None)):
        self.pieces = {rank: split(layout, rank, whole) for rank in layout.ranks}
        self.machines = machines
        self.sent = 0

    def ask(self, verb, reads, parts, *more):
        if verb == "read":
            raw = [look.slice_bytes(self.pieces[r.rank], part) for r, part in zip(reads, parts, strict=True)]
            self.sent += sum(part.nbytes for part in raw)
            return raw
        segment, shape = more
        return [self._write(r.rank, part, segment, shape) for r, part in zip(reads, parts, strict=True)]

    def _write(self, rank, part, segment, shape):
        memory = opened(replace(segment, machine=self.machines[rank] or segment.machine))
        if not isinstance(memory, torch.Tensor):
            return memory
        fill(memory, self.pieces[rank], shape, [part])
        return ""


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def shared_here():
    return "memfd:flexmagic" in Path("/proc/self/maps").read_text()


@pytest.fixture
def small(monkeypatch):
    """Small tensors take the ways of large ones."""
    monkeypatch.setattr(wire, "WORTH", 1)
    monkeypatch.setattr(wire, "MESSAGE", 700)
    monkeypatch.setattr(wire, "STRETCH", 900)


def came(cut, dtype, machines=(None, None), **options):
    whole = values(dtype)
    layout = layout_of(cut, dtype)
    ranks = Ranks(layout, whole, machines)
    told = []
    reads = plan_read(layout, tuple((0, n) for n in SHAPE))
    out = fetch(ranks.ask, reads, SHAPE, dtype, progress=lambda n, total: told.append((n, total)), **options)
    assert torch.equal(bits(out), bits(whole))
    assert [n for n, _ in told] == sorted(n for n, _ in told)
    assert told[-1] == (whole.nbytes, whole.nbytes)
    return out, ranks


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64]
)
def test_every_dtype_keeps_its_bits_both_ways(small, cut, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, ranks = came(cut, dtype)
        assert ranks.sent == 0
        _, ranks = came(cut, dtype, ("elsewhere", "elsewhere"))
        assert ranks.sent > 0


def test_each_rank_comes_the_way_it_can(small):
    _, ranks = came("columns", torch.float32, (None, "elsewhere"))
    assert ranks.sent == ranks.pieces[1].nbytes


def test_what_came_is_the_memory_itself_and_goes_with_the_tensor(small):
    fds = len(list(Path("/proc/self/fd").iterdir()))
    out, _ = came("columns", torch.float32)
    assert shared_here()
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    part = out[1]
    part += 1
    del out
    assert shared_here()
    del part
    assert not shared_here()


def test_a_system_without_such_memory_says_so_and_sends_messages(small, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", full)
    with pytest.warns(UserWarning, match=r"No space left on device.*through the controller"):
        _, ranks = came("rows", torch.float32)
    assert ranks.sent == values(torch.float32).nbytes


def test_another_file_than_was_meant_is_never_written_into():
    with segments.offered(8) as memory:
        assert opened(replace(memory.segment, token=b"!" * 16)) == "it is another file"
        assert opened(replace(memory.segment, nbytes=4)) == "it is another file"
        assert opened(replace(memory.segment, machine="elsewhere")) is None
        opened(memory.segment).fill_(3)
        assert memory.tensor().tolist() == [3] * 8


def test_addends_are_added(small):
    one, two = torch.randn(SHAPE), torch.randn(SHAPE)
    everything = tuple(slice(0, n) for n in SHAPE)
    reads = [Read(rank, everything, everything) for rank in (0, 1)]
    ranks = Ranks(layout_of("nothing", torch.float32), one)
    ranks.pieces = {0: one, 1: two}
    assert torch.equal(fetch(ranks.ask, reads, SHAPE, torch.float32, add=True), one + two)


@pytest.mark.parametrize("most", [1, 7, 64, 1000, 10**9])
def test_stretches_hold_everything_once_and_never_more_than_they_may(most):
    reads = plan_read(layout_of("columns", torch.float32), ((0, 3), (5, 40), (2, 24)))
    count = torch.zeros(3, 35, 22, dtype=torch.int64)
    for stretch in stretches(reads, 4, most):
        for rank in (0, 1):
            sizes = [nbytes(read.local, 4) for read in stretch if read.rank == rank]
            assert sum(sizes) <= max(most, 4)
        for read in stretch:
            shape = [part.stop - part.start for part in read.local]
            assert list(count[read.result].shape) == shape
            count[read.result] += 1
    assert (count == 1).all()


OFFER = """
import sys
from flexmagic.client.segments import offered
with offered(1 << 20) as memory:
    s = memory.segment
    print(s.machine, s.pid, s.fd, s.token.hex(), sep="|", flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_of_the_memory_of_a_process_that_was_killed():
    child = subprocess.Popen([sys.executable, "-c", OFFER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        said = child.stdout.readline().decode().strip().split("|")
        segment = segment_of(said)
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


def segment_of(said):
    where, pid, fd, token = said
    assert where == machine()
    return Segment(where, int(pid), int(fd), 1 << 20, bytes.fromhex(token))
