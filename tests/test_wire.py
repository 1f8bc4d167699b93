"""Pieces come whole and bit for bit, read from where they are or by messages, and leave nothing behind."""

import contextlib
import mmap
import os
import resource
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import zmq

from flexmagic.client import direct, reading, wire
from flexmagic.client.wire import Line, fetch, nbytes, stretches
from flexmagic.engine import lending, look, segments
from flexmagic.engine.captures import Captures
from flexmagic.engine.lending import Lent
from flexmagic.engine.outlet import Outlet
from flexmagic.layout.assemble import Read, plan_read, split
from flexmagic.layout.layout import Layout, contiguous_spans
from flexmagic.layout.mesh import Mesh
from flexmagic.layout.sites import Site

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


RUN, SITE = ("session", 1), Site("made")


class Ranks:
    """Ranks in this process that answer as engines do; ``machines``: where each believes to be asked from."""

    def __init__(self, layout, whole, machines=(None, None)):
        self.captures = {rank: Captures() for rank in layout.ranks}
        for rank, captures in self.captures.items():
            captures.keep(RUN, SITE, split(layout, rank, whole))
        self.machines = machines
        self.outlets = {rank: Outlet("127.0.0.1") for rank in layout.ranks}
        self.unreachable = set()
        self.sent = self.given_back = self.turns = 0

    def piece(self, rank):
        return self.captures[rank].get(RUN, SITE)

    def ask(self, verb, reads, parts, *more):
        out = {}
        for rank in {read.rank for read in reads}:  # one call for each rank, as of engines
            mine = [at for at, read in enumerate(reads) if read.rank == rank]
            answers = getattr(self, verb)(rank, [parts[at] for at in mine], *more)
            out |= zip(mine, answers, strict=True)
        return [out[at] for at in range(len(reads))]

    def read(self, rank, parts):
        raw = [look.slice_bytes(self.piece(rank), part) for part in parts]
        self.sent += sum(part.nbytes for part in raw)
        return raw

    def lend(self, rank, parts, reader):
        assert self.turns == 1
        where, pid = reader
        asked = (self.machines[rank] or where, pid)
        return lending.lend(self.captures[rank], (RUN, SITE), parts, asked, self.outlets[rank])

    def give_back(self, rank, reader):
        self.given_back += 1
        asked = (self.machines[rank] or reader[0], reader[1])
        assert self.captures[rank].lent[asked]
        lending.give_back(self.captures[rank], asked, self.outlets[rank])

    @contextlib.contextmanager
    def turn(self):
        self.turns += 1
        yield
        self.turns -= 1

    @property
    def line(self):
        return Line(self.ask, self.give_back, self.turn, self.unreachable)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture
def small(monkeypatch):
    """Small tensors take the ways of large ones."""
    monkeypatch.setattr(wire, "WORTH", 1)
    monkeypatch.setattr(wire, "MESSAGE", 700)
    monkeypatch.setattr(wire, "STRETCH", 90)


def came(cut, dtype, machines=(None, None), *, routes=True, **options):
    whole = values(dtype)
    layout = layout_of(cut, dtype)
    ranks = Ranks(layout, whole, machines)
    if not routes:
        for outlet in ranks.outlets.values():
            outlet.offer([])
            ranks.unreachable.add(outlet._endpoint)
    told = []
    reads = plan_read(layout, tuple((0, n) for n in SHAPE))
    out = fetch(ranks.line, reads, SHAPE, dtype, progress=lambda n, total: told.append((n, total)), **options)
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
        assert ranks.sent == 0  # straight from the ranks
        assert all(outlet._parts == {} for outlet in ranks.outlets.values())
        _, ranks = came(cut, dtype, ("elsewhere", "elsewhere"), routes=False)
        assert ranks.sent > 0


def test_each_rank_comes_the_way_it_can(small):
    _, ranks = came("columns", torch.float32, (None, "elsewhere"))
    assert ranks.sent == 0
    _, ranks = came("columns", torch.float32, (None, "elsewhere"), routes=False)
    assert ranks.sent == ranks.piece(1).nbytes


def test_a_rank_that_cannot_be_reached_sends_messages_and_is_not_tried_again(small, monkeypatch):
    monkeypatch.setattr(direct, "ROUTE", 0.3)
    monkeypatch.setattr(Outlet, "_serve", lambda *_: None)
    _, ranks = came("columns", torch.float32, ("elsewhere", None))
    assert ranks.sent == ranks.piece(0).nbytes
    assert ranks.unreachable == {ranks.outlets[0]._endpoint}
    monkeypatch.setattr(direct, "receive", lambda _out, wanted, *_: [] if not wanted else 1 / 0)
    whole = values(torch.float32)
    reads = plan_read(layout_of("columns", torch.float32), tuple((0, n) for n in SHAPE))
    ranks.captures[0].keep(RUN, SITE, split(layout_of("columns", torch.float32), 0, whole))
    fetch(ranks.line, reads, SHAPE, torch.float32)


def test_a_rank_that_falls_silent_half_way_sends_the_rest_in_messages(small, monkeypatch):
    monkeypatch.setattr(wire, "SENT", 90)
    monkeypatch.setattr(direct, "SILENCE", 0.3)
    sent, was = [], Outlet._part

    def once(self, *asked):
        sent.append(asked)
        if len(sent) > 3:
            raise zmq.ContextTerminated
        return was(self, *asked)

    monkeypatch.setattr(Outlet, "_part", once)
    _, ranks = came("rows", torch.float32, ("elsewhere", None))
    assert len(sent) > 3
    assert 0 < ranks.sent < ranks.piece(0).nbytes


def test_what_is_lent_is_held_until_it_is_given_back(small):
    _, ranks = came("columns", torch.float32)
    assert ranks.given_back == 2
    assert not any(captures.lent for captures in ranks.captures.values())


def test_a_system_that_does_not_let_it_is_told_of_and_messages_are_sent(small, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(reading, "_fill", refused)
    with pytest.warns(UserWarning, match=r"Operation not permitted.*through the controller"):
        _, ranks = came("rows", torch.float32)
    assert ranks.sent == values(torch.float32).nbytes
    assert ranks.given_back == 2


def test_a_process_that_is_gone_is_an_error_not_zeros():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    out = np.empty(8, np.uint8)
    with pytest.raises(OSError, match="No such process"):
        reading.read(out, (slice(0, 8),), Lent(child.pid, 4096, 8), 0, 8)
    with pytest.raises(OSError, match="Bad address"):
        reading.read(out, (slice(0, 8),), Lent(os.getpid(), 4096, 8), 0, 8)


def test_an_engine_that_ends_while_it_is_read_is_asked_again_and_says_so(small, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    def killed(*args):
        child.kill()
        child.wait()
        return filled(*args)

    filled = reading._fill
    monkeypatch.setattr(reading, "_fill", killed)
    monkeypatch.setattr(os, "getpid", lambda: child.pid)  # as a rank in that process would say
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of what may not be read
        _, ranks = came("rows", torch.float32)
    assert ranks.sent == values(torch.float32).nbytes


def test_what_was_lent_to_a_notebook_that_was_killed_is_let_go_of(small):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ranks = Ranks(layout_of("rows", torch.float32), values(torch.float32))
    part, here = [(slice(0, 2), slice(0, 40), slice(0, 24))], segments.machine()
    captures, outlet = ranks.captures[0], ranks.outlets[0]
    lending.lend(captures, (RUN, SITE), part, (here, child.pid), outlet)
    lending.lend(captures, (RUN, SITE), part, ("elsewhere", child.pid), outlet)
    assert len(captures.lent) == 2
    child.kill()
    child.wait()
    lending.lend(captures, (RUN, SITE), part, (here, os.getpid()), outlet)
    assert set(captures.lent) == {("elsewhere", child.pid), (here, os.getpid())}


def test_values_where_none_is_read_are_zero(small):
    layout = layout_of("rows", torch.float32)
    whole = values(torch.float32)
    reads = [r for r in plan_read(layout, tuple((0, n) for n in SHAPE)) if r.rank == 0]
    out = fetch(Ranks(layout, whole).line, reads, SHAPE, torch.float32)
    assert torch.equal(bits(out[:2]), bits(whole[:2]))
    assert not out[2:].any()


def test_addends_are_added(small):
    one, two = torch.randn(SHAPE), torch.randn(SHAPE)
    everything = tuple(slice(0, n) for n in SHAPE)
    reads = [Read(rank, everything, everything) for rank in (0, 1)]
    ranks = Ranks(layout_of("nothing", torch.float32), one)
    ranks.captures[1].keep(RUN, SITE, two)
    assert torch.equal(fetch(ranks.line, reads, SHAPE, torch.float32, add=True), one + two)


@pytest.mark.parametrize(
    "index", [(slice(0, 3), slice(5, 40), slice(2, 24)), (slice(1, 2), slice(0, 40), slice(0, 24))]
)
@pytest.mark.parametrize("short", [1, 256])
def test_rows_of_a_box_are_filled_where_they_belong(index, short, monkeypatch):
    monkeypatch.setattr(reading, "SHORT", short)
    monkeypatch.setattr(reading, "AT_ONCE", 5)
    out = np.zeros(SHAPE, np.uint32)
    source = np.arange(out[index].size, dtype=np.uint32) + 1
    reading.read(out, index, Lent(os.getpid(), source.ctypes.data, source.nbytes), 0, source.nbytes)
    truth = np.zeros(SHAPE, np.uint32)
    truth[index] = source.reshape(truth[index].shape)
    assert (out == truth).all()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_a_tensor_without_elements_is_one_without_asking_anybody(dtype):
    found = fetch(Line(None, None, None, set()), [], (48, 0), dtype)
    assert (found.shape, found.dtype) == ((48, 0), dtype)


def faults_of_touching(array):
    """How many pages of an array get their memory when it is written."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    array[:: mmap.PAGESIZE] += 1
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_room_is_made_for_whole_pages_and_no_others():
    page, count = mmap.PAGESIZE, 64
    fresh = mmap.mmap(-1, count * page)
    fresh.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(fresh, np.uint8)
    reading.make_room(array.ctypes.data + 1, (count // 2) * page)
    ready, rest = array[page : count // 2 * page], array[count // 2 * page :]
    assert faults_of_touching(ready) < count // 8
    assert faults_of_touching(rest) >= count // 4
    assert (array == 0).sum() == len(array) - count + 1


def test_an_array_has_its_room_before_anything_is_read(small, monkeypatch):
    made = []
    monkeypatch.setattr(reading, "make_room", lambda start, nbytes: made.append((start, nbytes)))
    monkeypatch.setattr(reading, "AT_A_TIME", 1000)
    monkeypatch.setattr(reading, "AHEAD", 2500)
    out, _ = came("columns", torch.float32, machines=(segments.machine(), segments.machine()))
    start = out.data_ptr()
    assert sorted(made) == [(start, 1000), (start + 1000, 1000), (start + 2000, 1000)]
