"""Guests who misuse a workshop, each while another one works on and gets what is right.

What they do is bounded, so that it harms nobody even where nothing stops it.
"""

import contextlib
import http.client
import json
import random
import secrets
import socket
import threading

import psutil
import pytest
import torch

from flexmagic.engine.box_walls import available
from flexmagic.engine.declared import Declared
from flexmagic.errors import ClusterError, FlexError, HookError, InputError, SiteError
from flexmagic.workshop.frames import VERSION, pack, unpack
from flexmagic.workshop.gateway import Workshop
from flexmagic.workshop.guest import Guest
from flexmagic.workshop.link import Link
from flexmagic.workshop.serving import TYPE, Server

from .conftest import MODEL, PROMPT, relative

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]
boxed = pytest.mark.skipif(bool(available()), reason=available() or "boxes can be made")

SITE = "model.layers.1.mlp"
EVERY = ("", ".self_attn", ".mlp", ".*layernorm", ".self_attn.*_proj", ".mlp.*_proj", ".mlp.act_fn")


@pytest.fixture(scope="module")
def shop(engines, tmp_path_factory):
    """One workshop for all of this file; its weights must be at its end what they were."""
    engines.load(MODEL, tp=2, attn="eager")
    server = Server(
        Workshop(engines.cluster_name, guests=40, journal=tmp_path_factory.mktemp("misuse") / "log.jsonl")
    )
    server.workshop.limit("runs=100000")
    yield server
    assert server.workshop.check_weights() == []
    server.close()
    assert '"weights": "unchanged"' in server.workshop.journal.path.read_text()


def joined(server, name):
    return Guest.join(server.lines[""].split()[-1], name)


@pytest.fixture(scope="module")
def truth(one_process, edited, ids):
    """The logits that the steady guest must have, whatever others do; the hook has an effect."""
    with torch.no_grad():
        plain = one_process(ids).logits
        with edited({SITE: lambda out: out * 0.5}) as model:
            found = model(ids).logits
    assert relative(found, plain) > 1e-3
    return found


class Steady:
    """A guest who runs again and again in a thread, and compares."""

    def __init__(self, guest, truth):
        self._guest, self._truth = guest, truth
        self.off, self.errors, self._over = [], [], threading.Event()
        self._one = threading.Condition()
        self._thread = threading.Thread(target=self._work)

    def _work(self):
        while not self._over.is_set():
            try:
                off = relative(self._guest.run(PROMPT).logits.torch(), self._truth)
            except FlexError as error:
                with self._one:
                    self.errors.append(error)
                    self._one.notify_all()
                return
            with self._one:
                self.off.append(off)
                self._one.notify_all()

    def __enter__(self):
        self._thread.start()
        return self

    def once_more(self):
        """Wait for a run that began after this was called."""
        with self._one:
            after = len(self.off) + 2
            assert self._one.wait_for(lambda: len(self.off) >= after or self.errors, 120)

    def __exit__(self, *exc):
        if not exc[0]:
            self.once_more()
        self._over.set()
        self._thread.join()


@pytest.fixture(scope="module")
def calm(shop):
    guest = joined(shop, "steady")
    guest.printer = lambda _said: None  # runs of before are let go of
    guest.hook(SITE, Declared("scale", (0.5,)), name="half")
    return guest


@pytest.fixture
def steady(shop, calm, truth):
    """Somebody else's work, going on meanwhile; none of it may fail or be wrong."""
    with Steady(calm, truth) as working:
        working.once_more()
        yield working
    assert not working.errors
    assert max(working.off) < 1e-5


@pytest.fixture
def bad(shop):
    guest = joined(shop, "bad")
    yield guest
    shop.workshop.drop(guest.name)


def log(server):
    return [json.loads(line) for line in server.workshop.journal.path.read_text().splitlines()]


def own(server, guest):
    """The log's lines of a guest since it joined."""
    lines = log(server)
    joins = [n for n, line in enumerate(lines) if (line["who"], line["what"]) == (guest.name, "join")]
    return [line for line in lines[joins[-1] :] if line["who"] == guest.name]


def named(server, guest, logged, shown=None):
    """Whether the log and the owner's table name a guest with what went wrong."""
    row = next(row for row in server.workshop.status().rows if row[0] == guest.name)
    return any(logged in json.dumps(line) for line in own(server, guest)) and (shown or logged) in row[-1]


# --- code ------------------------------------------------------------------------------------------------

FORKS = "import os\nfor _ in range(8):\n    if os.fork() == 0: os._exit(0)"
SHELL = "import os\nif os.system('echo x > {left}') != 0: raise PermissionError('no shell')"


@boxed
@pytest.mark.parametrize(
    "case",
    [
        ("while True: pass", "a loop without end"),
        (FORKS, "not permitted"),
        ("import threading\nfor _ in range(8): threading.Thread(target=print).start()", "thread"),
        ("held = bytearray(10 << 30)", "MemoryError"),
        ("x = torch.empty(10 << 28)", "allocate"),
        (SHELL, "no shell"),
        ("open('{left}', 'w').write('x')", "not permitted"),
        ("open('/etc/passwd')", "not permitted"),
        ("import socket\nsocket.socket().connect(('127.0.0.1', {port}))", "not permitted"),
        ("import ctypes\nctypes.string_at(0)", "its process ended"),
        ("module.down_proj.weight.mul_(2)", "cannot be had in a box"),
    ],
)
def test_code_that_misuses_its_box_is_an_error_of_its_guest_alone(shop, steady, bad, tmp_path, case):
    code, said = case
    left = tmp_path / "left"
    code = code.replace("{left}", str(left)).replace("{port}", str(shop.port))
    bad.hook(SITE, code, name="bad")
    with pytest.raises(HookError, match=said):
        bad.run(PROMPT)
    assert named(shop, bad, '"outcome": "HookError', "bad")
    assert not left.exists()
    steady.once_more()
    bad.hook(SITE, "x *= 0.5", name="bad")
    assert bad.run(PROMPT).number, "a hook that is mended has a new box"


@boxed
def test_a_flood_of_print_is_cut(shop, steady, bad):
    said = []
    bad.printer = said.append
    bad.hook("model.layers.*.mlp", "for _ in range(50_000): print('x' * 100)", name="flood")
    bad.run(PROMPT)
    assert 1000 < len("".join(said)) < 4 * 21_000
    assert "cut off" in "".join(said)


# --- others' things --------------------------------------------------------------------------------------


def test_nothing_of_others_is_found_by_guessing(shop, steady, bad, calm):
    theirs = calm.run  # runs of theirs are there all the time
    assert theirs
    for number in range(1, 20):  # refusals of one guest are logged up to a number in a minute
        for site in (SITE, ":output.logits"):
            with pytest.raises(SiteError, match="You have no run"):
                bad._link.ask("read", run=number, site=site, index=[0, 0, 0])
        with pytest.raises(InputError, match="no run under that ticket"):
            bad._link.ask("wait", ticket=number)
        with pytest.raises(InputError, match="no run under that ticket"):
            bad._link.ask("cancel", ticket=number)
        with pytest.raises(SiteError, match="You have no run"):
            bad._link.ask("hook", sites=[SITE], saved={"run": number, "site": SITE})
    with pytest.raises(HookError, match="half"):
        bad.hooks.switch("remove", "half")
    for field in ("owner", "guest", "token", "seat"):
        with pytest.raises(InputError):
            bad._link.ask("read", run=1, site=SITE, index=[0], **{field: "steady"})
    assert [hook.name for hook in calm.hooks] == ["half"]


def test_forged_tokens_and_replayed_requests_do_nothing(shop, steady, bad):
    for _ in range(100):
        with pytest.raises(ClusterError, match="does not know that token"):
            Link(type(bad._link.address)("127.0.0.1", shop.port, secrets.token_urlsafe(18)))
    run = pack({"version": VERSION, "number": 500, "kind": "run", "inputs": PROMPT})
    assert post(shop, run, bad)[0] == 200
    done = [line for line in log(shop) if line["who"] == bad.name and line["what"] == "run"]
    for _ in range(20):
        status, said = post(shop, run, bad)
        assert (status, "heard before" in unpack(said)[0]["message"]) == (403, True)
        assert post(shop, run, bad, seat=secrets.token_urlsafe(18))[0] == 403
    steady.once_more()
    after = [line for line in log(shop) if line["who"] == bad.name and line["what"] == "run"]
    assert len(after) <= len(done) + 1, "one run, however often it is asked for"
    refused = [line for line in log(shop) if line["what"] == "refused"]
    assert any("stranger" in line["who"] and "token" in line["error"] for line in refused)
    assert named(shop, bad, "heard before")


# --- messages --------------------------------------------------------------------------------------------


def headers(guest, seat=None):
    return {"Content-Type": TYPE, "Authorization": f"Bearer {seat or guest._link.facts['seat']}"}


def post(server, body, guest, *, seat=None, more=()):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/ask", body, {**headers(guest, seat), **dict(more)})
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_a_request_of_a_gigabyte_is_refused_before_it_is_read(shop, steady, bad):
    before = psutil.Process().memory_info().rss
    for more in ({"Content-Length": str(1 << 30)}, {"Transfer-Encoding": "chunked"}):
        with socket.create_connection(("127.0.0.1", shop.port), timeout=60) as link:
            said = "".join(f"{name}: {value}\r\n" for name, value in {**headers(bad), **more}.items())
            link.sendall(f"POST /ask HTTP/1.1\r\nHost: x\r\n{said}\r\n".encode())
            assert b" 413 " in link.recv(100)
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 64 << 20:
                    sent += link.send(b"\0" * (1 << 20))
            assert sent < 64 << 20, "the connection is broken"
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert named(shop, bad, "at most 16,777,216 bytes")


def test_mangled_messages_are_refused_one_by_one(shop, steady, bad):
    draw, number, seen = random.Random(3), 1000, set()
    for _ in range(300):
        number += 1
        good = pack(
            {"version": VERSION, "number": number, "kind": draw.choice(["run", "hook", "read", "overview"])},
            [b"abcd"],
        )
        mangled = bytearray(good)
        for _ in range(draw.randint(1, 6)):
            mangled[draw.randrange(len(mangled))] = draw.randrange(256)
        if draw.random() < 0.3:
            del mangled[draw.randrange(len(mangled)) :]
        status, said = post(shop, bytes(mangled), bad)
        seen.add(status)
        assert "error" in unpack(said)[0]
    assert seen <= {200, 400, 403}
    assert 400 in seen
    assert not any(line["who"] == "gateway" and line["what"] == "error" for line in log(shop))
    assert named(shop, bad, "400", "message")
