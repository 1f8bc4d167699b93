"""Guests who misuse a workshop, each while another one works on and gets what is right.

What they do is bounded, so that it harms nobody even where nothing stops it.
"""

import asyncio
import contextlib
import gc
import http.client
import itertools
import json
import random
import secrets
import socket
import threading
import time

import numpy as np
import psutil
import pytest
import torch
import tornado.iostream

from flexmagic.engine.box_walls import available
from flexmagic.engine.declared import Declared
from flexmagic.errors import ClusterError, FlexError, HookError, InputError, SiteError
from flexmagic.workshop import serving
from flexmagic.workshop.allowance import Allowance
from flexmagic.workshop.frames import HEADER, MAGIC, VERSION, pack, put, unpack
from flexmagic.workshop.gateway import REFUSALS, Workshop
from flexmagic.workshop.guest import Guest
from flexmagic.workshop.link import Link
from flexmagic.workshop.running import bytes_of
from flexmagic.workshop.serving import AT_ONCE, TYPE, Server

from .conftest import MODEL, PROMPT, relative

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]
boxed = pytest.mark.skipif(bool(available()), reason=available() or "boxes can be made")

SITE = "model.layers.1.mlp"
EVERY = (
    "",
    ".self_attn:output[0]",
    ".self_attn:output[1]",
    ".mlp",
    ".*layernorm",
    ".self_attn.*_proj",
    ".mlp.*_proj",
    ".mlp.act_fn",
)


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
def plain(one_process, ids):
    """The logits without any hook."""
    with torch.no_grad():
        return one_process(ids).logits


@pytest.fixture(scope="module")
def truth(plain, edited, ids):
    """The logits that the steady guest must have, whatever others do; the hook has an effect."""
    with torch.no_grad(), edited({SITE: lambda out: out * 0.5}) as model:
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


def place_of(server, guest):
    """What the gateway has of a guest."""
    return next(one for one in server.workshop.guests if one.name == guest.name)


def calm_guest(server):
    """One who may ask as often as its thread can, whatever the others may."""
    guest = joined(server, "steady")
    guest.printer = lambda _said: None  # runs of before are let go of
    often = Allowance(runs=10**6, requests=10**6, moved=10**12)
    place_of(server, guest).use._allowance = lambda: often
    guest.hook(SITE, Declared("scale", (0.5,)), name="half")
    return guest


@pytest.fixture(scope="module")
def calm(shop):
    guest = calm_guest(shop)
    yield guest
    guest.stop()


@pytest.fixture
def steady(shop, calm, truth):
    """Somebody else's work, going on meanwhile; none of it may fail or be wrong."""
    with Steady(calm, truth) as working:
        working.once_more()
        yield working
    assert not working.errors
    assert max(working.off) < 1e-5


NUMBERS = itertools.count(1)


@pytest.fixture
def bad(shop):
    guest = joined(shop, f"bad {next(NUMBERS)}")  # of one name so many refusals are logged in a minute
    yield guest
    guest.stop()
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


def raw(text):
    """A message whose header is written by hand."""
    return MAGIC + len(text).to_bytes(4, "big") + text.encode()


def asked(kind, **fields):
    return {"version": VERSION, "number": 1 << 30, "kind": kind, **fields}


HALF = "\ud800"  # JSON can name it, but it is no character
READ = {"run": 1, "site": SITE}
NO_REQUESTS = [
    *(
        {**asked("hooks"), "version": version}
        for version in (0, 1, VERSION + 1, -1, 10**300, "2", None, [2], True)
    ),
    *({**asked("hooks"), "number": number} for number in (0, -1, 1.5, "7", None, True, [1], -(10**300))),
    *(asked("run", inputs=PROMPT, seed=seed) for seed in (-1, 1 << 40, 10**300, 0.5, "1", True, [0])),
    *(asked("run", inputs=PROMPT, new_tokens=count) for count in (0, -1, 4097, 10**300, 2.0)),
    *(
        asked("run", inputs=PROMPT, new_tokens=2, sampling={"temperature": t})
        for t in (0, -1, 101, 10**300, "1")
    ),
    *(
        asked("run", inputs=inputs)
        for inputs in ("", "x" * 20_001, "a\0b", HALF, [], [[]], ["x"] * 257, [[-1]])
    ),
    *(asked("run", inputs=inputs) for inputs in ([[1 << 40]], [[1], [1, 2]], [[1.0]], [[[1]]], {"x": 1}, 1)),
    *(
        asked("run", inputs=PROMPT, capture=sites)
        for sites in ([SITE] * 257, ["x" * 201], [HALF], [[]], SITE)
    ),
    *(asked("run", inputs=PROMPT, skip={site: 0}) for site in ("x" * 201, HALF, "", "a\0b", "/a+/")),
    *(asked("run", inputs=PROMPT, skip={SITE: value}) for value in (10**301, "1", [1], {})),
    *(asked("hook", sites=[SITE], name=name) for name in ("", "x" * 201, HALF, 1, ["a"])),
    *(asked("hook", sites=[SITE], code=code) for code in ("x" * 20_001, HALF, 1, ["x"])),
    *(asked("hook", sites=[SITE], every=every) for every in (0, -1, 1 << 40, 1.5, True)),
    *(
        asked("hook", sites=[SITE], do={"kind": "scale", "numbers": n})
        for n in ([10**301], ["1"], [1] * 5, 1)
    ),
    *(
        asked("hook", sites=sites)
        for sites in ([], [SITE] * 65, ["**" + "*" * 9], ["{1..9}" * 3], ["(a+)+"] * 65)
    ),
    *(
        asked("read", **READ, index=index)
        for index in ([-1], [[0, -1]], [[0]], [1 << 41], [0] * 9, [True], [0.5])
    ),
    *(asked("read", run=run, site=SITE, index=[0]) for run in (0, -1, 1 << 41, 10**300, 1.0, "1", True)),
    *(asked("top", run=1, k=k) for k in (0, -1, 101, 10**300, 1.5)),
    *(asked("top", run=1, row=row) for row in (1 << 21, -(1 << 21), 10**300)),
    *(asked("wait", ticket=ticket) for ticket in (0, -1, 1 << 41, 10**300, 1.0, "1", None)),
    *(
        asked("shares", **READ, edges=edges)
        for edges in ([], [0], [1, 0], [0] * 2049, [0, "1"], [0, 10**301])
    ),
    *(asked("notices", since=since) for since in (-1, 1 << 41, 10**300, 1.0, "0")),
    *(asked(kind) for kind in ("", "RUN", "__class__", "x" * 100_000, HALF, None, 1, ["run"], {"run": 1})),
    asked("hooks", **{"x" * 100_000: 1}),
    asked("hooks", **{HALF: 1}),
]
WRITTEN = [  # what no JSON library writes
    '{"version": 2, "number": NaN, "kind": "hooks", "frames": []}',
    '{"version": 2, "number": Infinity, "kind": "hooks", "frames": []}',
    '{"version": 2, "number": NUMBER, "kind": "top", "run": 1, "row": -Infinity, "frames": []}',
    '{"version": 2, "number": NUMBER, "kind": "shares", "run": 1, "edges": [1e999], "frames": []}',
    f'{{"version": 2, "number": {"9" * 100_000}, "kind": "hooks", "frames": []}}',
    '{"version": 2, "number": NUMBER, "kind": "hooks", "frames": [-1]}',
    '{"version": 2, "number": NUMBER, "kind": "hooks", "frames": [1e999]}',
    f'{{"version": 2, "number": NUMBER, "kind": "hooks", "frames": [{"9" * 4000}]}}',
    '{"a": ' * 50_000 + "1" + "}" * 50_000,
    "[" * 500_000,
    '{"version": 2, "number": NUMBER, "kind": "run", "frames": [], "inputs": ' + "[" * 900 + "]" * 900 + "}",
    "1" * (HEADER + 1),
]


def test_fields_beyond_their_bounds_are_refused_one_by_one(shop, steady, bad):
    before = place_of(shop, bad).errors
    for number, text in enumerate(WRITTEN, 1000):
        status, said = post(shop, raw(text.replace("NUMBER", str(number))), bad)
        assert (status, "error" in unpack(said)[0]) == (400, True), text[:100]
    assert named(shop, bad, '"status": 400', "header")
    for header in NO_REQUESTS:
        status, said = post(shop, pack(header), bad)
        assert (status, "error" in unpack(said)[0]) in {(200, True), (400, True), (403, True)}, header
        bad._link.join()  # a place whose numbers begin anew
    assert place_of(shop, bad).errors - before == len(NO_REQUESTS) + len(WRITTEN)
    assert not any(line["who"] == "gateway" and line["what"] == "error" for line in log(shop))


def test_values_that_fit_nothing_are_errors_of_their_guest_alone(shop, steady, bad):
    """Fields within their bounds which no run, tensor or hook of this model can have."""
    mine = bad.run(PROMPT, capture=SITE)
    where = {"run": mine.number, "site": SITE}
    far, frames = {"fixed_dims": [7], "fixed_at": [1 << 40]}, []
    values = put(np.full((3, 5), np.nan, np.float32), frames)
    for kind, fields in (
        ("read", {**where, "index": [0, [0, 1 << 40], 1 << 40]}),
        ("read", {**where, "index": [0] * 8}),
        ("read", {**where, "rank": 1 << 20, "index": [0, 0, 0]}),
        ("read", {**where, "step": 1 << 20, "index": [0, 0, 0]}),
        ("look", {**where, "hook": "x" * 200}),
        ("top", {"run": mine.number, "row": 1 << 20}),
        ("top", {"run": mine.number, "position": -(1 << 20)}),
        ("overview", {**where, "rows": 7, "cols": 7, "row_edges": [0, 1 << 40], "col_edges": [0, 1]}),
        ("overview", {**where, "rows": 1, "cols": 2, **far, "row_edges": [0, 1], "col_edges": [0, 1]}),
        ("hook", {"sites": ["x" * 200]}),
        ("hook", {"sites": [SITE], "step": "9" * 150 + ":-1"}),
        ("hook", {"sites": [SITE], "do": {"kind": "patch"}}),
        ("hook", {"sites": [SITE], "do": {"kind": "scale", "numbers": [2], "values": values}}),
        ("switch", {"action": "enable", "names": ["x" * 200] * 64}),
    ):  # fmt: skip
        with pytest.raises(FlexError) as error:
            bad._link.ask(kind, frames if "values" in str(fields) else None, **fields)
        assert "could not do that" not in str(error.value), (kind, fields)
    for inputs in ([[1 << 31]], [[2048]], [[1] * 5000], [[1] * 300] * 2):
        with pytest.raises(FlexError) as error:
            bad._waited(bad._link.ask("run", inputs=inputs)[0], None)
        assert "could not do that" not in str(error.value), inputs[0][:1]
    bad.hook(SITE, Declared("clamp", (-1e300, 1e300)), name="wide", row="-" + "9" * 150)
    with pytest.raises(HookError, match=r"there is no row -9{150}: this tensor has 1"):
        bad.run(PROMPT)
    bad.hook(SITE, Declared("clamp", (-1e300, 1e300)), name="wide")
    with pytest.raises(HookError, match="without overflow"):
        bad.run(PROMPT)
    bad.hook(SITE, Declared("clamp", (-1e30, 1e30)), name="wide", token="0:" + "9" * 150)
    assert relative(bad.run(PROMPT).logits.torch(), mine.logits.torch()) == 0
    bad.hook(SITE, Declared("scale", (1e38,)), name="wide")
    assert not bool(bad.run(PROMPT).logits.torch().isfinite().all()), "its own values are its own affair"
    assert not any(line["who"] == "gateway" and line["what"] == "error" for line in log(shop))


# --- too much --------------------------------------------------------------------------------------------


def until(seen):
    """Wait for the gateway's own sign."""
    end = time.monotonic() + 120
    while not seen():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


@contextlib.contextmanager
def opened(server, count):
    """Connections that take little at a time."""
    with contextlib.ExitStack() as stack:
        links = []
        for _ in range(count):
            link = stack.enter_context(socket.socket())
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.settimeout(120)
            link.connect(("127.0.0.1", server.port))
            links.append(link)
        yield links


def written(guest, number, kind, **fields):
    """A request as it goes over a connection."""
    body = pack({"version": VERSION, "number": number, "kind": kind, **fields})
    said = "".join(f"{name}: {value}\r\n" for name, value in headers(guest).items())
    return f"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{said}\r\n".encode() + body


def answers(link):
    """What comes over a connection, answer by answer."""
    with link.makefile("rb") as file:
        while status := file.readline():
            length = 0
            while (line := file.readline()) not in {b"\r\n", b""}:
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            yield int(status.split()[1]), unpack(file.read(length))[0]


@pytest.fixture
def held(monkeypatch):
    """Answers that are held back, for as long as the event is not set."""
    sleep, gate = asyncio.sleep, threading.Event()
    gate.count = 0

    async def wait(seconds, *more):
        if seconds == serving.SLOWED:
            gate.count += 1
            while not gate.is_set():
                await sleep(0.01)
        else:
            await sleep(seconds, *more)

    monkeypatch.setattr(serving, "SLOWED", 1.23)
    monkeypatch.setattr(asyncio, "sleep", wait)
    yield gate
    gate.set()


def test_thousands_of_tiny_requests_are_held_back_and_others_run(shop, steady, bad, held):
    most, more = 2000, 500
    place = place_of(shop, bad)
    shop.workshop.limit(f"requests={most}")
    before, kinds = place.use._requests.total, ("notices", "status", "hooks")
    flood = b"".join(
        written(bad, 10_000 + n, kinds[n % 50 // 48], **({"since": 0} if n % 50 < 48 else {}))
        for n in range(most - before + more)
    )
    with opened(shop, AT_ONCE + 1) as (first, *others):
        sending = threading.Thread(target=first.sendall, args=(flood,))
        sending.start()
        coming = answers(first)
        for _ in range(most - before):
            status, said = next(coming)
            assert (status, "error" in said) == (200, False)
        until(lambda: held.count == 1)
        for n, link in enumerate(others[:-1]):
            link.sendall(written(bad, 20_000 + n, "status"))
            until(lambda n=n: held.count == n + 2)
        assert place.under_way == AT_ONCE
        others[-1].sendall(written(bad, 30_000, "status"))
        status, said = next(answers(others[-1]))
        assert (status, f"{AT_ONCE} requests under way" in said["message"]) == (429, True)
        steady.once_more()
        assert held.count == AT_ONCE, "whoever floods waits, and nobody else"
        held.set()
        for status, said in [next(coming) for _ in range(more)] + [
            next(answers(link)) for link in others[:-1]
        ]:
            assert (status, f"{most} requests a minute" in said["message"]) == (200, True)
        sending.join()
    until(lambda: place.under_way == 0)
    refused = [line for line in own(shop, bad) if line["what"] == "refused"]
    assert 0 < len(refused) <= REFUSALS, "so much of a flood is written down and no more"
    assert place.errors >= more
    assert named(shop, bad, f"{most} requests a minute", "requests a minute")
    shop.workshop.limit(f"requests={Allowance().requests}")
    bad._link._number = 40_000
    assert bad.run(PROMPT).number


LONG = [[5] * 250] * 16
"""Rows whose logits have 33 MB."""


def waiting_to_leave():
    """Bytes of answers that the gateway holds for who does not read them."""
    streams = [one for one in gc.get_objects() if type(one) is tornado.iostream.IOStream]
    return sum(len(one._write_buffer or b"") for one in streams)


def test_replies_that_are_never_read_are_thrown_away(shop, steady, bad, plain, monkeypatch):
    run = bad.run(LONG)
    place, nbytes = place_of(shop, bad), 4 * np.prod(run.logits.shape)
    index = [[0, size] for size in run.logits.shape]
    monkeypatch.setattr(serving, "UNREAD", 2.0)
    with opened(shop, 4) as links:
        for n, link in enumerate(links):
            ask = written(bad, 10_000 + n, "read", run=run.number, site=":output.logits", index=index)
            link.sendall(ask)
            until(lambda n=n: place.number == 10_000 + n)
        until(lambda: waiting_to_leave() > nbytes / 2)
        steady.once_more()
        until(lambda: sum(line.get("status") == 408 for line in own(shop, bad)) == 4)
        until(lambda: place.under_way == 0)
        assert waiting_to_leave() < nbytes / 2
        for link in links:
            got = 0
            with contextlib.suppress(OSError):
                while more := len(link.recv(1 << 20)):
                    got += more
            assert 0 < got < nbytes / 2, "the connection was broken"
    assert named(shop, bad, "not read for 2 s", "not read")
    steady.once_more()
    bad._link._number = 20_000
    assert relative(bad.run(PROMPT).logits.torch(), plain) < 1e-5


@boxed
def test_hooks_on_every_site_and_captures_of_everything_are_held_to_a_guests_bytes(shop, steady, bad, plain):
    said, place = [], place_of(shop, bad)
    bad.printer = said.append
    sites = [f"model.layers.*{end}" for end in EVERY]
    everything = [
        *sites,
        "model.layers.*.mlp:input",
        "model.layers.*.mlp.*_proj:input",
        "model.norm",
        "lm_head",
    ]
    for n, site in enumerate(everything):
        bad.hook(site, "x *= 1\nprint('ran')", name=f"every {n}")
    most = f"you may hold {Allowance().captured:,}"
    with pytest.raises(InputError, match=rf"would capture [\d,]+ bytes; {most}"):
        bad.run(LONG)
    with pytest.raises(InputError, match=most):
        bad.run(LONG, capture=everything, without=[hook.name for hook in bad.hooks])
    with pytest.raises(InputError, match="16,384 tokens; you may have 4,096"):
        bad.run([[5] * 256] * 64)
    assert (said, len(place.runs)) == ([], 0), "nothing has run"
    assert named(shop, bad, '"outcome": "OverLimitError', "you may have 4,096")
    steady.once_more()
    run = bad.run(PROMPT, capture=everything)
    assert "".join(said).count("ran") > 4 * len(EVERY), "now they all have"
    assert relative(run.logits.torch(), plain) < 1e-5
    size = bytes_of(place.runs[run.number])
    shop.workshop.limit(f"captured={2 * size + size // 2}")
    for _ in range(4):
        last = bad.run(PROMPT, capture=everything)
        assert sum(map(bytes_of, place.runs.values())) <= 2.5 * size
    assert len(place.runs) == 2
    with pytest.raises(SiteError, match="You have no run"):
        run[SITE].numpy()
    assert last[SITE].numpy().any()
    shop.workshop.limit(f"captured={Allowance().captured}")
    for n in range(Allowance().hooks - len(bad.hooks)):
        bad.hook(SITE, "", name=f"one more {n}")
    with pytest.raises(InputError, match="You may have 32 hooks"):
        bad.hook(SITE, "", name="one too many")
    assert named(shop, bad, "You may have 32 hooks")
