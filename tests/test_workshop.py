"""The parts of a workshop that know no cluster: messages, requests, turns, limits, places, addresses."""

import json
import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flexmagic.engine.declared import KINDS, Declared
from flexmagic.errors import ClusterError, FlexError, HookError, InputError, SiteError
from flexmagic.view.reduce import compute_stats
from flexmagic.workshop import requests as asked
from flexmagic.workshop.address import Address
from flexmagic.workshop.allowance import Allowance, OverLimitError, Use
from flexmagic.workshop.collecting import STATS, Collected, Found
from flexmagic.workshop.desk import Desk, Job
from flexmagic.workshop.frames import MAGIC, MalformedError, pack, put, take, unpack
from flexmagic.workshop.guest_notices import GuestNotices
from flexmagic.workshop.guests import Guest, Guests, RefusedError
from flexmagic.workshop.journal import Journal, digest
from flexmagic.workshop.lesson import Lesson
from flexmagic.workshop.notices import KEPT, Board, Notice
from flexmagic.workshop.requests import parse
from flexmagic.workshop.rota import QUEUE, Rota, jain


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


# --- messages ----------------------------------------------------------------------------------------


def test_a_message_comes_out_as_it_went_in():
    frames = []
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    said = put(array, frames)
    header, back = unpack(pack({"kind": "x", "array": said}, frames))
    assert header["kind"] == "x"
    assert (take(header["array"], back) == array).all()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"FXW1",
        b"FXW2" + b"\0\0\0\2{}",
        MAGIC + b"\xff\xff\xff\xff{}",
        MAGIC + b"\0\0\0\2[]",
        MAGIC + b"\0\0\0\2{}",
        MAGIC + b"\0\0\0\1{",
        pack({"a": 1}) + b"more",
        pack({"a": 1}, [b"abc"])[:-1],
        pack({"a": float("nan")}),
        MAGIC + (100_000).to_bytes(4, "big") + b"[" * 100_000,
        pack({}, [b""] * 65),
    ],
)
def test_what_is_no_message_is_refused(raw):
    with pytest.raises(MalformedError):
        unpack(raw)


def test_mangled_messages_are_refused_or_read_and_nothing_else():
    draw = random.Random(0)
    good = pack({"version": 1, "number": 3, "kind": "run", "inputs": "x", "array": {"frame": 0}}, [b"abcd"])
    refused = 0
    for _ in range(3000):
        raw = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        try:
            header, frames = unpack(bytes(raw))
            parse(header.pop("kind", None), header, frames)
        except InputError:
            refused += 1
    assert refused > 2500


@pytest.mark.parametrize(
    "said",
    [
        None,
        {"frame": 1, "dtype": "float32", "shape": [1]},
        {"frame": 0, "dtype": "object", "shape": [1]},
        {"frame": 0, "dtype": "float32", "shape": [2]},
        {"frame": 0, "dtype": "float32", "shape": [-1]},
        {"frame": True, "dtype": "float32", "shape": [1]},
        {"frame": 0, "dtype": "float32", "shape": [1], "pickle": 1},
    ],
)
def test_what_is_no_array_is_refused(said):
    with pytest.raises(MalformedError):
        take(said, [b"\0\0\0\0"])


# --- requests ----------------------------------------------------------------------------------------


def test_a_request_has_its_fields_and_no_others():
    run = parse("run", {"inputs": "x", "capture": ["a.*"], "skip": {"m": None, "n": 0.5}}, [])
    assert run == asked.MakeRun("x", ("a.*",), 0, None, (), None, {"m": None, "n": 0.5}, None, {})
    hook = parse("hook", {"sites": ["a"], "do": {"kind": "scale", "numbers": [0.5]}, "token": "-1"}, [])
    assert (hook.do.kind, hook.do.numbers, str(hook.limits)) == ("scale", (0.5,), "token -1")


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("exec", {}),
        (None, {}),
        (["run"], {}),
        ("run", {}),
        ("run", {"inputs": {"input_ids": [[1]]}}),
        ("run", {"inputs": [[1], [1, 2]]}),
        ("run", {"inputs": "x" * 30_000}),
        ("run", {"inputs": "x", "backward": "1"}),
        ("run", {"inputs": "x", "seed": 1.5}),
        ("run", {"inputs": "x", "seed": True}),
        ("run", {"inputs": "x", "capture": "a"}),
        ("run", {"inputs": "x", "capture": ["a"] * 1000}),
        ("run", {"inputs": "x", "skip": {"a": "1+1"}}),
        ("run", {"inputs": "x", "new_tokens": 1 << 20}),
        ("run", {"inputs": "x", "new_tokens": 1, "sampling": {"stopping_criteria": 1}}),
        ("run", {"inputs": "x", "new_tokens": 1, "sampling": {"temperature": -1}}),
        ("hook", {"sites": ["a"], "do": {"kind": "pickle"}}),
        ("hook", {"sites": ["a"], "do": {"kind": "scale", "numbers": []}}),
        ("hook", {"sites": ["a"], "do": {"kind": "zero"}, "code": "x"}),
        ("hook", {"sites": ["a"], "local": True}),
        ("hook", {"sites": ["/(a+)+/"]}),
        ("hook", {"sites": ["*a*b*c*"]}),
        ("hook", {"sites": ["{1..9}{1..9}{1..9}"]}),
        ("hook", {"sites": ["a"], "step": "-1"}),
        ("read", {"run": 1, "site": "a", "index": [[0, -1]]}),
        ("read", {"run": -1, "site": "a", "index": []}),
        ("read", {"run": 1, "owner": "else", "site": "a", "index": []}),
        ("overview", {"run": 1, "site": "a", "rows": 0, "cols": 1, "row_edges": [1, 0], "col_edges": [0, 1]}),
        (
            "overview",
            {"run": 1, "site": "a", "rows": 0, "cols": 1, "row_edges": [0] * 9999, "col_edges": [0]},
        ),
        ("switch", {"action": "__init__", "names": []}),
        ("top", {"run": 1, "k": 10**9}),
        ("notices", {}),
        ("notices", {"since": -1}),
        ("look", {"shown": 0}),
        ("look", {"shown": 1, "run": 1, "site": "a"}),
    ],
)
def test_requests_that_are_none_are_refused(kind, given):
    with pytest.raises(InputError):
        parse(kind, given, [])


# --- turns -------------------------------------------------------------------------------------------


def test_turns_go_round_whoever_asks_for_more():
    rota = Rota()
    for n in range(4):
        rota.add("greedy", n)
    rota.add("ann", "a")
    rota.add("ben", "b")
    assert rota.place("ann", "a") == 1
    assert rota.place("greedy", 1) == 3
    assert [rota.take()[0] for _ in range(6)] == ["greedy", "ann", "ben", "greedy", "greedy", "greedy"]
    assert rota.take() is None


def test_places_are_how_many_turns_come_before():
    draw = random.Random(1)
    for _ in range(200):
        rota, jobs = Rota(), []
        for n in range(draw.randint(1, 12)):
            guest = draw.choice("abcd")
            if rota.add(guest, n):
                jobs.append((guest, n))
        said = {job: rota.place(*job) for job in jobs}
        taken = [rota.take() for _ in jobs]
        assert {job: at for at, job in enumerate(taken)} == said


def test_a_guest_has_only_so_much_waiting():
    rota = Rota()
    assert [rota.add("a", n) for n in range(QUEUE + 1)] == [True] * QUEUE + [False]
    assert rota.drop("a") == list(range(QUEUE))
    assert len(rota) == 0


@pytest.mark.parametrize("together", [1, 8])
def test_thirty_guests_get_the_same_share_however_they_ask(together):
    draw = random.Random(2)
    rota, done = Rota(), dict.fromkeys(range(30), 0)
    eager = {guest: draw.choice([1, 2, 8]) for guest in done}
    for _ in range(3000):
        for guest, most in eager.items():
            while rota.place(guest, None) == 0 and len(rota._ring.get(guest, ())) < most:
                rota.add(guest, object())
        taken = [rota.take(), *rota.take_like(lambda _job: True, together - 1)]
        for guest, _ in taken:
            done[guest] += 1
    assert sum(done.values()) == 3000 * together
    assert jain(list(done.values())) > 0.99
    assert jain([1.0] + [0.0] * 29) == pytest.approx(1 / 30)


def test_only_what_fits_is_done_together():
    rota = Rota()
    for guest, job in (("a", 1), ("b", 2), ("c", 3), ("d", 5)):
        rota.add(guest, job)
    assert rota.take() == ("a", 1)
    assert rota.take_like(lambda job: job % 2 == 1, 1) == [("c", 3)]
    assert [rota.take()[0] for _ in range(2)] == ["b", "d"]


def guest_of(name="ann", clock=None):
    clock = clock or Clock()
    return Guest(name, "", Use(Allowance, clock), 0.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_ends_the_worker_and_nobody_waits_for_ever(error):
    """An interrupt may come at any time, as while an engine is replaced; a disk may be full."""
    jobs = [Job(guest_of(name), "look", parse("hooks", {}, [])) for name in ("a", "b")]

    def do(now):
        if now[0] is jobs[0]:
            raise error
        now[0].done.set_result(({}, []))

    def full():
        raise OSError

    desk = Desk(do, lambda _a, _b: False, lambda: 1, full)
    desk.start()
    assert desk.add(jobs[0])
    with pytest.raises(FlexError, match=error.__name__):
        jobs[0].done.result(timeout=10)
    assert desk.add(jobs[1])
    assert jobs[1].done.result(timeout=10) == ({}, [])
    desk.close()


def test_the_desk_works_off_runs_and_looks_and_pauses():
    order, seen = [], threading.Event()

    def do(jobs):
        order.append([job.kind for job in jobs])
        for job in jobs:
            job.done.set_result(({}, []))
        seen.set()

    desk = Desk(do, lambda _a, _b: True, lambda: 2, lambda: None)
    run = parse("run", {"inputs": "x"}, [])
    runs = [Job(guest_of(name), f"run {name}", run) for name in ("a", "b", "c")]
    look = Job(guest_of("a"), "look", parse("hooks", {}, []))
    desk.pause(paused=True)
    desk.start()
    for job in (*runs, look):
        assert desk.add(job)
    assert look.done.result(timeout=10) == ({}, [])
    assert desk.waiting == 3
    assert desk.place(runs[2])[0] == 2
    assert desk.withdraw(runs[1])
    desk.pause(paused=False)
    for job in (runs[0], runs[2]):
        job.done.result(timeout=10)
    assert order == [["look"], ["run a", "run c"]]
    desk.close()
    assert not desk.add(look)
    with pytest.raises(InputError, match="was closed"):
        desk.errand(lambda: None).result(timeout=10)


# --- limits ------------------------------------------------------------------------------------------


def test_limits_hold_for_a_minute():
    clock = Clock()
    use = Use(lambda: Allowance(runs=2, moved=100, tokens=10, requests=3), clock)
    use.run()
    clock.now = 30
    use.run()
    with pytest.raises(OverLimitError, match=r"2 runs a minute: try again in 30 s"):
        use.run()
    clock.now = 61
    use.run()
    use.move(60)
    with pytest.raises(OverLimitError, match="100 bytes a minute"):
        use.move(60)
    with pytest.raises(OverLimitError, match="11 tokens; you may have 10"):
        use.tokens(11)
    for _ in range(3):
        use.request()
    with pytest.raises(OverLimitError, match="3 requests a minute"):
        use.request()


def test_limits_are_read_as_they_are_written():
    changed = Allowance().changed("runs=20, captured=64MB seconds=2.5")
    assert (changed.runs, changed.captured, changed.seconds) == (20, 64_000_000, 2.5)
    assert Allowance().changed(str(changed)) == changed
    assert "captured=64MB" in str(changed)
    assert "moved=1000001B" in str(changed.changed("moved=1000001"))
    assert Allowance().changed("tokens=12345678").tokens == 12345678
    odd = Allowance().changed("moved=1000001 tokens=12345678 captured=0.5KB")
    assert Allowance().changed(str(odd)) == odd
    for wrong in ("runs", "walks=3", "runs=-1", "runs=3MB", "captured=much"):
        with pytest.raises(InputError):
            Allowance().changed(wrong)


# --- places ------------------------------------------------------------------------------------------


def places(most=2, *, open_to_all=True):
    clock = Clock()
    return Guests(
        most,
        lambda name, token: Guest(name, token, Use(Allowance, clock), 0.0),
        clock,
        open_to_all=open_to_all,
    )


def test_the_key_gives_each_a_place_and_its_token_brings_them_back():
    guests = places()
    ann, seat, token = guests.join(guests.key, "ann")
    other, _, _ = guests.join(guests.key, "ann")
    assert (ann.name, other.name) == ("ann", "ann2")
    with pytest.raises(RefusedError, match="full"):
        guests.join(guests.key, "cleo")
    back, new_seat, none = guests.join(token, "whoever")
    assert back is ann
    assert none == ""
    assert guests.seated(new_seat) is ann
    with pytest.raises(RefusedError, match="another one took it"):
        guests.seated(seat)


def test_forged_and_replayed_are_refused():
    guests = places(open_to_all=False)
    token = guests.tokens["guest1"]
    for forged in ("", token[:-1], token + "x", "guest1"):
        with pytest.raises(RefusedError):
            guests.join(forged, "x")
    guest, seat, _ = guests.join(token, "x")
    assert guest.name == "guest1"
    assert token not in repr(guest), "only its hash is kept with the guest"
    guests.heard(guest, 1)
    for number in (1, 0, None, "2", True):
        with pytest.raises(RefusedError):
            guests.heard(guest, number)
    guests.out("guest1")
    with pytest.raises(RefusedError):
        guests.seated(seat)
    with pytest.raises(RefusedError, match="asked to leave"):
        guests.join(token, "x")
    with pytest.raises(ClusterError, match="no guest"):
        guests.out("guest1")


@pytest.mark.parametrize("name", ["", "x" * 50, "a\nb", "<b>"])
def test_names_are_plain(name):
    guests = places()
    with pytest.raises(RefusedError):
        guests.join(guests.key, name)


def test_addresses():
    token, fingerprint = "t" * 24, "0" * 64
    for text in (f"127.0.0.1:80/{token}", f"lab.example:4000/{token}/{fingerprint}", f"[::1]:80/{token}"):
        assert str(Address.read(text)) == text
    with pytest.raises(InputError, match="fingerprint"):
        Address.read(f"lab.example:4000/{token}")
    for wrong in ("", "http://x", f"127.0.0.1/{token}", f"127.0.0.1:99999/{token}", "127.0.0.1:80/short"):
        with pytest.raises(InputError):
            Address.read(wrong)


def test_the_log_is_json_lines_that_only_its_owner_reads(tmp_path):
    log = Journal(tmp_path / "a" / "log.jsonl")
    log.note("ann", "run", seconds=0.5, outcome="ok")
    log.close()
    log.note("ann", "late")
    (line,) = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["who"] == "ann"
    assert (tmp_path / "a" / "log.jsonl").stat().st_mode & 0o077 == 0
    assert digest(["a"]) != digest(["b"])


# --- hooks without code ------------------------------------------------------------------------------


def done(kind, x, *numbers, values=None):
    return Declared(kind, numbers, values).function()(x, None)


def test_what_hooks_without_code_do():
    torch.manual_seed(0)
    x, vector = torch.randn(3, 5, 4), torch.randn(4)
    assert not done("zero", x).any()
    assert torch.equal(done("scale", x, 0.5), x * 0.5)
    assert torch.equal(done("add", x, 2.0, values=vector), x + 2 * vector)
    assert torch.allclose(done("mean", x), x.mean((0, 1)).expand_as(x))
    assert torch.equal(done("mean", x, values=vector), vector.expand_as(x))
    assert torch.equal(done("patch", x, values=x[:1]), x[:1].expand_as(x))
    assert torch.equal(done("clamp", x, -0.1, 0.1), x.clamp(-0.1, 0.1))
    left = done("project", x, values=vector)
    assert torch.allclose(left @ vector, torch.zeros(3, 5), atol=1e-6)
    assert not torch.allclose(left, x)
    rows = done("resample", x)
    assert sorted(rows[:, 0, 0].tolist()) == sorted(x[:, 0, 0].tolist())
    assert not any(torch.equal(rows[n], x[n]) for n in range(3))
    assert set(KINDS) == {
        "zero",
        "scale",
        "add",
        "mean",
        "resample",
        "patch",
        "project",
        "clamp",
    }


@pytest.mark.parametrize(
    ("kind", "numbers", "values"),
    [
        ("eval", (), None),
        ("scale", (), None),
        ("scale", (float("nan"),), None),
        ("zero", (), torch.ones(2)),
        ("add", (), None),
        ("add", (), torch.ones(2, dtype=torch.int64)),
        ("clamp", (1.0, 0.0), None),
        ("project", (), torch.zeros(4)),
        ("project", (), torch.ones(2, 2)),
    ],
)
def test_what_makes_no_hook_is_refused(kind, numbers, values):
    with pytest.raises(InputError):
        Declared(kind, numbers, values)


def test_values_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\[3\] do not fit what is here, \[2, 4\]"):
        done("add", torch.ones(2, 4), values=torch.ones(3))
    with pytest.raises(ValueError, match="two rows"):
        done("resample", torch.ones(1, 4))


# --- what the owner puts up --------------------------------------------------------------------------


def test_the_board_keeps_the_last_notices_and_views():
    board = Board()
    assert (board.last, board.since(0)) == (0, [])
    for n in range(KEPT + 3):
        board.put("view", f"site {n}", "look", view=f"tensor {n}")
    assert board.last == KEPT + 3
    assert [notice.number for notice in board.since(0)] == list(range(4, KEPT + 4))
    assert [notice.name for notice in board.since(KEPT + 2)] == [f"site {KEPT + 2}"]
    assert board.view(KEPT + 3) == f"tensor {KEPT + 2}"
    with pytest.raises(SiteError, match="Number 2 is not shown any more"):
        board.view(2)
    assert len(board.put("collect", "x" * 500, "y" * 5000).said) <= 1000


def test_a_notice_comes_out_as_it_went_in_or_is_refused():
    hook = Notice(3, "hook", "damp", "The owner offers damp.", "%%flexhook a\nx *= 2")
    assert Notice.read(hook.header) == hook
    assert "%flexworkshop take damp" in hook.line
    view = Notice(4, "view", "a:output", "The owner shows it.")
    assert Notice.read(view.header) == view
    assert "%flexworkshop view 4" in view.line
    for wrong in ({"kind": "run"}, {"number": 0}, {"said": "x" * 2000}, {"cell": 3}, {"code": "1"}):
        with pytest.raises(MalformedError):
            Notice.read({**hook.header, **wrong})


def lesson(*, code=True):
    done = []
    journal = SimpleNamespace(note=lambda *who, **facts: done.append((who, facts)))
    return Lesson(Board(), (), journal, None, errand=None, code=lambda: code), done


def test_a_hook_is_offered_as_it_is_written():
    teach, log = lesson()
    for cell, name in (
        ("%%flexhook model.layers.*.mlp --name 'two words' --token=-1\nx *= 2", "two words"),
        ("%%flexhook m.1, m.2\nx *= 2\n\n", "m.1, m.2"),
        ("%flexhook m --do 'scale 0.5' --name=half", "half"),
    ):
        notice = teach.send(cell)
        assert (notice.kind, notice.name, notice.cell) == ("hook", name, cell.strip("\n"))
    assert teach.send(SimpleNamespace(name="own", cell="%%flexhook m\nx += 1")).name == "own"
    assert [facts["hook"] for _, facts in log][-1] == "own"


@pytest.mark.parametrize(
    "cell",
    [
        "",
        "import os",
        "%%px\n1",
        "%%flexhook",
        "%%flexhook m --local\nx *= 2",
        "%%flexhook m --when=True\nx *= 2",
        "%%flexhook m --name 'open\nx *= 2",
        "%%flexhook m\n" + "x" * 30_000,
    ],
)
def test_what_guests_could_not_register_is_not_offered(cell):
    teach, _ = lesson()
    with pytest.raises(InputError):
        teach.send(cell)
    assert teach.board.last == 0


def test_code_is_not_offered_where_guests_may_have_none():
    teach, _ = lesson(code=False)
    assert teach.send("%flexhook m --do zero").name == "m"
    with pytest.raises(InputError, match="code are off"):
        teach.send("%%flexhook m\nx *= 2")


def test_only_what_was_captured_is_shown():
    teach, _ = lesson()
    for wrong in (np.zeros(3), "x", None):
        with pytest.raises(InputError, match="is captured"):
            teach.show(wrong)


def test_a_statistic_is_that_of_the_finite_values():
    values = np.array([3.0, -4.0, 0.0, np.nan, np.inf])
    stats = compute_stats(values)
    found = {name: of(stats) for name, of in STATS.items()}
    finite = values[np.isfinite(values)]
    assert found["norm"] == pytest.approx(np.linalg.norm(finite))
    assert found["rms"] == pytest.approx(np.sqrt((finite**2).mean()))
    assert (found["mean"], found["min"], found["max"]) == pytest.approx((finite.mean(), -4, 3))
    assert (found["zeros"], found["nan"], found["n"]) == (1, 1, 5)


def test_what_was_collected_is_a_table_and_a_strip():
    hostile = "<img src=x onerror=alert(1)>"
    found = Collected(
        "m", "norm", (Found("ann", 3, 2.0), Found(hostile, 1, -4.0), Found("cleo", None, None, "no run yet"))
    )
    assert found.values == {"ann": 2.0, hostile: -4.0}
    lines = str(found).splitlines()
    assert lines[0] == "norm of m in the last run of each guest"
    assert [line.count("█") for line in lines[3:]] == [12, 24, 0]
    assert "no run yet" in lines[-1]
    assert hostile not in found._repr_html_()
    assert found.strip().source.labels(0) == ["ann", hostile]
    with pytest.raises(InputError, match="No guest's last run"):
        Collected("m", "norm", (Found("cleo", None, None),)).strip()


class Told:
    """A link to a board that stands here."""

    def __init__(self, board):
        self.board, self.noticed, self.asked = board, 0, []

    def ask(self, kind, *, since):
        assert kind == "notices"
        self.asked.append(since)
        self.noticed = self.board.last
        return {"board": self.board.name, "notices": [n.header for n in self.board.since(since)]}, []


def test_a_guest_hears_of_each_notice_once_and_asks_only_for_what_is_new():
    link = Told(Board())
    notices = GuestNotices(link)
    assert notices.new() == []
    assert link.asked == []
    link.board.put("hook", "a", "A is offered.", "%flexhook m --do zero --name a")
    assert notices.new() == [], "no answer has told of it yet"
    link.noticed = 1
    assert [n.name for n in notices.new()] == ["a"]
    assert (notices.new(), notices.cell("a")) == ([], "%flexhook m --do zero --name a")
    with pytest.raises(HookError, match="Offered: a"):
        notices.cell("b")
    with pytest.raises(SiteError, match="shows nothing yet"):
        notices.view()
    assert link.asked == [0, 1, 1, 1]
    notices._lock.acquire()
    assert [n.name for n in notices.glance()] == ["a"], "a page that asks waits for nothing"
    notices._lock.release()
    link.glance = lambda kind, **fields: None
    assert [n.name for n in notices.glance()] == ["a"]
    link.board = Board()  # opened anew, with as many notices
    link.board.put("hook", "b", "B is offered.", "%flexhook m --do zero --name b")
    assert [n.name for n in notices.all()] == ["b"]
    assert [n.name for n in notices.new()] == ["b"]
    for n in range(KEPT):
        link.board.put("view", f"m.{n}", "M is shown.")
    link.noticed = link.board.last
    assert len(notices.new()) == KEPT
    assert "%flexworkshop view 17" in str(notices.table())
