"""Straight lines: calls and answers of any size, interrupts, other users' cells, and ends."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections import defaultdict
from types import SimpleNamespace

import pytest

from flexmagic.client import engine_side
from flexmagic.client.straight import Lines
from flexmagic.client.straight_end import MOST, PACKET, End

PATIENCE = 20.0
"""Seconds after which what should have come has not."""


class Kernel:
    """As much of an engine's kernel as an end needs."""

    def __init__(self):
        self._main_asyncio_lock = asyncio.Lock()
        self.session = SimpleNamespace(message_count=0)
        self.parents = []

    def set_parent(self, _ident, parent):
        self.parents.append(parent["header"]["msg_id"])

    def pre_handler_hook(self):
        pass

    def post_handler_hook(self):
        pass

    def _publish_status(self, *_args, **_options):
        pass


class Engine(threading.Thread):
    """An end in a loop of its own."""

    def __init__(self):
        super().__init__(daemon=True)
        self.up = threading.Event()
        self.start()
        assert self.up.wait(PATIENCE)

    def run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        self.kernel = Kernel()
        self.end = End(self.kernel)
        self.up.set()
        await self.over.wait()

    def stop(self):
        self.loop.call_soon_threadsafe(self.over.set)
        self.join(PATIENCE)
        self.end.close()


@pytest.fixture
def engine():
    made = Engine()
    yield made
    made.stop()


@pytest.fixture
def client():
    return SimpleNamespace(
        session=SimpleNamespace(session="mine"),
        metadata=defaultdict(lambda: {"data": {}, "stdout": "", "stderr": ""}),
        _output_futures={},
    )


@pytest.fixture
def line(engine):
    lines = Lines()
    lines.connect(0, engine.end.name)
    yield lines.of(0)
    lines.close()


def value(answer):
    answer.wait(PATIENCE)
    return answer.get()


@pytest.fixture
def verbs(monkeypatch):
    """What the engine's verbs do, by name."""
    found = {}
    monkeypatch.setattr(engine_side, "call", lambda verb, payload: found[verb](payload))
    return found


def test_a_call_is_answered_under_its_own_number(engine, client, line, verbs):
    verbs["double"] = lambda payload: payload * 2
    answers = [line.send(client, "double", raw, answer=True) for raw in (b"a", b"", b"cd")]
    assert [value(answer) for answer in answers] == [b"aa", b"", b"cdcd"]
    assert len(set(engine.kernel.parents)) == 3
    assert all(parent.startswith("mine") for parent in engine.kernel.parents)


def test_an_answer_may_be_longer_than_a_packet(client, line, verbs):
    verbs["large"] = lambda _payload: os.urandom(1) * (5 * PACKET + 7)
    found = value(line.send(client, "large", b"", answer=True))
    assert len(found) == 5 * PACKET + 7
    assert len(set(found)) == 1


def test_a_call_too_long_for_the_line_goes_another_way(client, line):
    assert line.send(client, "any", bytes(MOST), answer=True) is None
    assert line.stands


def test_what_nobody_waits_for_is_done_in_order(client, line, verbs):
    done = []
    verbs["note"] = done.append
    for number in range(20):
        line.send(client, "note", bytes([number]), answer=False)
    verbs["all"] = lambda _payload: list(done)
    assert value(line.send(client, "all", b"", answer=True)) == [bytes([n]) for n in range(20)]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_is_raised_is_an_answer(error, client, line, verbs):
    def fail(_payload):
        raise error

    verbs["fail"], verbs["well"] = fail, lambda _payload: 1
    with pytest.raises(RuntimeError, match=type(error).__name__):
        value(line.send(client, "fail", b"", answer=True))
    assert value(line.send(client, "well", b"", answer=True)) == 1


def test_an_answer_of_what_a_cell_defined(client, line, verbs):
    class Own:
        number = 7

    verbs["own"] = lambda _payload: Own()
    assert value(line.send(client, "own", b"", answer=True)).number == 7


def test_a_call_waits_for_the_cell_that_runs(engine, client, line, verbs):
    verbs["well"] = lambda _payload: 1
    began, end = threading.Event(), asyncio.Event()

    async def cell():
        async with engine.kernel._main_asyncio_lock:
            began.set()
            await end.wait()
            assert not engine.kernel.parents

    task = asyncio.run_coroutine_threadsafe(cell(), engine.loop)
    assert began.wait(PATIENCE)
    first, second = (line.send(client, "well", b"", answer=True) for _ in range(2))
    first.wait(0.05)
    assert not first.ready()
    engine.loop.call_soon_threadsafe(end.set)
    task.result(PATIENCE)
    assert value(first) == value(second) == 1


def test_an_engine_that_ends_ends_its_calls(engine, client, line, verbs):
    hold = threading.Event()
    verbs["hold"] = lambda _payload: hold.wait(PATIENCE)
    pending = line.send(client, "hold", b"", answer=True)
    line.socket.shutdown(2)  # as the system does for a process that is gone
    pending.wait(PATIENCE)
    hold.set()
    with pytest.raises(ConnectionError, match="ended"):
        pending.get()
    assert not line.stands
    assert line.send(client, "hold", b"", answer=True) is None


def test_what_is_no_answer_ends_the_line_and_no_other(engine, client, verbs):
    verbs["well"] = lambda _payload: 1
    lines = Lines()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind("\0flexmagic-odd")
        server.listen()
        lines.connect(0, "flexmagic-odd")
        lines.connect(1, engine.end.name)
        odd, good = lines.of(0), lines.of(1)
        peer, _ = server.accept()
        pending = odd.send(client, "well", b"", answer=True)
        peer.send(b"?")
        pending.wait(PATIENCE)
        with pytest.raises(ConnectionError):
            pending.get()
        assert value(good.send(client, "well", b"", answer=True)) == 1
        peer.close()
    lines.close()


def test_there_is_no_line_to_a_name_that_nobody_has():
    lines = Lines()
    lines.connect(0, "flexmagic-nobody")
    assert lines.of(0) is None
    lines.close()


def test_a_line_that_is_hung_up_leaves_no_thread(engine):
    lines = Lines()
    lines.connect(0, engine.end.name)
    thread = lines._thread
    lines.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_another_users_process_is_not_listened_to(engine, client, verbs, monkeypatch):
    verbs["well"] = lambda _payload: 1
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    lines = Lines()
    lines.connect(0, engine.end.name)
    line = lines.of(0)
    pending = None if line is None else line.send(client, "well", b"", answer=True)
    if pending is not None:
        pending.wait(PATIENCE)
        with pytest.raises(ConnectionError):
            pending.get()
    assert not engine.kernel.parents
    lines.close()
