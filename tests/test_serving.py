"""A gateway's door: what is counted, what is held back, and what becomes of replies that nobody reads."""

import asyncio
import contextlib
import http.client
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from flexmagic.workshop import serving
from flexmagic.workshop.allowance import Allowance, Use
from flexmagic.workshop.desk import Job
from flexmagic.workshop.frames import TYPE, VERSION, pack, unpack
from flexmagic.workshop.guests import Guest, Guests
from flexmagic.workshop.requests import parse
from flexmagic.workshop.serving import AT_ONCE, Server


class Workshop:
    """Of a workshop, its door and its places; ``answer`` is what everybody gets."""

    def __init__(self):
        self.allowance = Allowance()

        def guest(name, token):
            return Guest(name, token, Use(lambda: self.allowance, lambda: 0.0), 0.0)

        self.guests = Guests(2, guest, lambda: 0.0, open_to_all=True)
        self.memory = SimpleNamespace(door={}, save=lambda: None)
        self.board = SimpleNamespace(last=0)
        self.is_over, self.noted, self.heard = False, [], []
        self.answer = {}, []

    def refused(self, who, status, error):
        self.noted.append((who, status, error))

    def ask(self, guest, kind, given, frames):
        self.heard.append(kind)
        return self.answer

    def close(self, **_options):
        pass


@pytest.fixture
def server():
    made = Server(Workshop())
    yield made
    made.close()


class Ann:
    """A guest who speaks plain HTTP over sockets of her own."""

    def __init__(self, server):
        self.workshop, self._port, self.number = server.workshop, server.port, 0
        self.guest, self._seat, _ = server.workshop.guests.join(server.workshop.guests.key, "ann")
        self._open = []

    def open(self):
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(60)
        link.connect(("127.0.0.1", self._port))
        self._open.append(link)
        return link

    def body(self, **fields):
        self.number += 1
        return pack({"version": VERSION, "number": self.number, "kind": "hooks", **fields})

    def head(self, length):
        said = f"Content-Type: {TYPE}\r\nAuthorization: Bearer {self._seat}\r\nContent-Length: {length}"
        return f"POST /ask HTTP/1.1\r\nHost: x\r\n{said}\r\n\r\n".encode()

    def begun(self, body=b""):
        """A connection on which a request was sent, with a body that never comes if none is given."""
        link = self.open()
        link.sendall(self.head(len(body) or 100) + body)
        return link

    def ask(self, body=None):
        """One request and its answer."""
        return answered(self.begun(body or self.body()))

    def close(self):
        for link in self._open:
            link.close()


def answered(link):
    answer = http.client.HTTPResponse(link)
    answer.begin()
    return answer.status, unpack(answer.read())[0]


@pytest.fixture
def ann(server):
    made = Ann(server)
    yield made
    made.close()


def until(seen):
    """Wait for the gateway's own sign."""
    end = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def test_a_request_is_under_way_from_its_first_byte_until_its_guest_goes(ann):
    begun = [ann.begun() for _ in range(AT_ONCE)]
    until(lambda: ann.guest.under_way == AT_ONCE)
    status, said = ann.ask()
    assert (status, f"{AT_ONCE} requests under way" in said["message"]) == (429, True)
    assert ann.guest.last_error == said["message"]
    assert ann.guest.under_way == AT_ONCE, "what is refused is not counted"
    begun.pop().close()
    until(lambda: ann.guest.under_way == AT_ONCE - 1)
    assert ann.ask()[0] == 200
    for link in begun:
        link.close()
    until(lambda: ann.guest.under_way == 0)
    assert ann.workshop.heard == ["hooks"]


def test_each_request_counts_once_however_it_ends(ann):
    for body in (ann.body(), b"nonsense", pack({"version": 99}), ann.body()):
        ann.ask(body)
    ann.close()
    until(lambda: ann.guest.under_way == 0)
    assert [status for _, status, _ in ann.workshop.noted] == [400, 400]
    job = Job(ann.guest, "hooks", parse("hooks", {}, []))
    ann.workshop.answer = job
    link = ann.begun(ann.body())
    until(lambda: len(ann.workshop.heard) == 3)
    link.close()
    assert ann.ask(b"nonsense")[0] == 400
    until(lambda: ann.guest.under_way <= 1)
    assert ann.guest.under_way == 1, "its answer is still being made, though nobody waits for it"
    job.done.set_result(({}, []))
    until(lambda: ann.guest.under_way == 0)


def test_a_reply_that_nobody_reads_is_thrown_away(ann, monkeypatch):
    monkeypatch.setattr(serving, "UNREAD", 0.1)
    ann.workshop.answer = {}, [bytes(32 << 20)]
    link = ann.begun(ann.body())
    until(lambda: ann.workshop.noted)
    assert ann.workshop.noted == [("ann", 408, "A reply was not read for 0.1 s, and thrown away.")]
    assert (ann.guest.last_error, ann.guest.errors) == (ann.workshop.noted[0][2], 1)
    until(lambda: ann.guest.under_way == 0)
    assert len(b"".join(rest(link))) < 32 << 20, "the connection was broken"


def rest(link):
    with contextlib.suppress(OSError):
        while said := link.recv(1 << 20):
            yield said


def test_over_the_limit_answers_are_held_back_also_to_what_is_refused(ann, monkeypatch):
    held, sleep = [], asyncio.sleep

    async def note(seconds, *more):
        if seconds == serving.SLOWED:
            held.append(seconds)
        else:
            await sleep(seconds, *more)

    monkeypatch.setattr(asyncio, "sleep", note)
    monkeypatch.setattr(serving, "SLOWED", 1.23)
    ann.workshop.allowance = Allowance(requests=3)
    stale = ann.body()
    for body in (stale, stale, b"nonsense"):
        ann.ask(body)
    assert [status for _, status, _ in ann.workshop.noted] == [403, 400]
    assert not held
    for n, body in enumerate((ann.body(), stale, b"nonsense")):
        status, said = ann.ask(body)
        assert (status, said["message"][:34]) == (200, "You may make 3 requests a minute: ")
        assert len(held) == n + 1
    assert ann.workshop.heard == ["hooks"]
