"""Guests of one loaded model: each alone in a world of its own, with the values of one process."""

import contextlib
import dataclasses
import http.client
import json
import threading

import pytest
import torch

from flexmagic.engine.box_walls import available
from flexmagic.engine.declared import Declared
from flexmagic.errors import ClusterError, FlexError, HookError, InputError, ModelError, SiteError
from flexmagic.workshop.address import Address
from flexmagic.workshop.frames import VERSION, pack, unpack
from flexmagic.workshop.gateway import Workshop
from flexmagic.workshop.guest import Guest
from flexmagic.workshop.link import TIMEOUT, Link
from flexmagic.workshop.opening import open_workshop
from flexmagic.workshop.serving import TYPE, Server

from .conftest import PROMPT, relative

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

SITE = "model.layers.1.mlp"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - that is what is tried


@pytest.fixture
def server(loaded, tmp_path):
    made = Server(Workshop(loaded.cluster_name, guests=6, journal=tmp_path / "log.jsonl"))
    yield made
    made.close()


def address(server):
    return server.lines[""].split()[-1]


@pytest.fixture
def three(server):
    guests = [Guest.join(address(server), name) for name in ("ann", "ben", "cleo")]
    yield guests
    for guest in guests:
        guest.stop()


def at_once(*calls):
    """What calls return that are made by threads at the same time."""
    out = [None] * len(calls)

    def call(n):
        try:
            out[n] = calls[n]()
        except FlexError as error:
            out[n] = error

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_two_guests_hooks_on_one_site_never_meet(three, loaded, one_process, edited, ids):
    ann, ben, cleo = three
    ann.hook(SITE, Declared("scale", (0.25,)), name="mine")
    ben.hook(SITE, Declared("zero"), name="mine", token=-1)

    def last_zero(out):
        out = out.clone()
        out[:, -1] = 0
        return out

    with torch.no_grad():
        plain = one_process(ids).logits
        with edited({SITE: lambda out: out * 0.25}) as model:
            quarter = model(ids).logits
        with edited({SITE: last_zero}) as model:
            zeroed = model(ids).logits
    assert min(relative(quarter, plain), relative(zeroed, plain)) > 1e-3, "the hooks have an effect"
    for _ in range(2):
        runs = at_once(*(lambda g=g: g.run(PROMPT, capture=SITE) for g in three))
        for run, truth in zip(runs, (quarter, zeroed, plain), strict=True):
            assert relative(run.logits.torch(), truth) < 1e-5
    assert relative(loaded.run(PROMPT).logits.torch(), plain) < 1e-5, "nothing is left on the owner's runs"
    assert not bool(runs[1][SITE][0, -1].any())
    assert "mine" in repr(ann.hooks)
    assert len(cleo.hooks) == 0


def test_a_guest_reads_its_own_runs_and_no_others(three, loaded):
    ann, ben, _ = three
    mine = ann.run(PROMPT, capture=SITE)
    owners = loaded.run(PROMPT, capture=SITE)
    whole = owners[SITE].numpy()
    assert (mine[SITE].numpy() == whole).all()
    assert (mine[SITE][0, -1, ::2] == whole[0, -1, ::2]).all()
    assert mine[SITE].stats() == owners[SITE].stats()
    assert mine[SITE].info.shape == owners[SITE].info.shape
    assert mine.top(3).rows == owners.top(3).rows
    with pytest.raises(SiteError, match="You have no run 1"):
        ben._link.ask("read", run=mine.number, site=SITE, index=[0, 0, 0])
    with pytest.raises(InputError):
        ben._link.ask("read", run=mine.number, owner=loaded._id, site=SITE, index=[0, 0, 0])
    with pytest.raises(SiteError):
        ann._link.ask("look", run=owners.number + 1000, site=SITE)
    mine.release()
    with pytest.raises(SiteError):
        mine[SITE].numpy()


def test_the_viewer_shows_a_guests_tensor(three, loaded):
    from flexmagic.view.png import to_png
    from flexmagic.view.source import ByRank, Source

    mine, owners = three[0].run(PROMPT, capture=SITE)[SITE], loaded.run(PROMPT, capture=SITE)[SITE]
    assert isinstance(mine, Source)
    assert isinstance(mine, ByRank)
    assert to_png(mine)[:4] == b"\x89PNG"
    assert mine.digests() == owners.digests()
    assert list(mine.labels(1)) == list(owners.labels(1))
    assert (mine.held(1).numpy() == owners.held(1).numpy()).all()


def test_runs_together_are_what_they_are_alone(three, server):
    ann, ben, cleo = three
    ann.hook(SITE, Declared("scale", (0.25,)), token="2:")
    ben.hook(SITE, Declared("resample"))
    ben.hook("model.layers.2.mlp:input", Declared("clamp", (-0.1, 0.1)))
    cleo.hook(
        "model.layers.0",
        Declared(
            "add", (), torch.ones(ann.run(PROMPT, capture="model.layers.0")["model.layers.0"].shape[-1])
        ),
    )
    two = [PROMPT, PROMPT.replace("Mary", "John")]
    asked = (
        lambda: ann.run(PROMPT, capture=SITE),
        lambda: ben.run(two, capture=SITE, seed=3),
        lambda: cleo.run(PROMPT[:30], capture=[SITE, "model.layers.*.self_attn"]),
    )
    server.workshop.together = 1
    alone = at_once(*asked)
    server.workshop.together = 8
    server.workshop.pause()
    done = []
    thread = threading.Thread(target=lambda: done.extend(at_once(*asked)))
    thread.start()
    while server.workshop._desk.waiting < 3:
        threading.Event().wait(0.01)  # polling for the gateway's own sign
    server.workshop.resume()
    thread.join()
    last = [json.loads(line) for line in server.workshop.journal.path.read_text().splitlines()]
    assert [line["together"] for line in last if line["what"] == "run"][-3:] == [3, 3, 3]
    for one, other in zip(done, alone, strict=True):
        for site in (SITE, ":output.logits"):
            assert relative(one[site].torch(), other[site].torch()) < 1e-5
        assert repr(one[SITE]).split("after")[1:] == repr(other[SITE]).split("after")[1:]
        assert one.ids == other.ids


def test_a_guest_comes_back_to_the_same_world(three, server):
    ann = three[0]
    ann.hook(SITE, Declared("zero"), name="mine")
    run = ann.run(PROMPT, capture=SITE)
    there = ann.address
    ann.stop()
    again = Guest.join(there)
    assert again.name == ann.name
    assert [hook.name for hook in again.hooks] == ["mine"]
    assert not again._link.ask("look", run=run.number, site=SITE)[0]["text"].startswith("<Hook")
    with pytest.raises(ClusterError, match="another one took it"):
        ann.run(PROMPT)
    server.workshop.drop(again.name)
    with pytest.raises(ClusterError):
        again.run(PROMPT)
    with pytest.raises(ClusterError, match="asked to leave"):
        Guest.join(there)


def test_guests_generate_what_one_process_does(three, server, one_process, ids):
    ann, ben, cleo = three
    ann.hook("model.layers.0.mlp", Declared("zero"), name="mine")
    with torch.no_grad():
        truth = one_process.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    heard = []
    made, other, plain = at_once(
        lambda: ben.generate(PROMPT, 12, capture=SITE, progress=heard.append),
        lambda: ann.generate(PROMPT, 12),
        lambda: cleo.run(PROMPT, capture=SITE),
    )
    assert made.ids[0] == truth
    assert other.ids[0] != truth, "a hook of one's own acts in each step"
    assert made.steps == len(truth) - ids.shape[1] > 4
    assert made.text[0]
    assert relative(made.step(0)[SITE].torch(), plain[SITE].torch()) < 1e-5
    assert made.step(3)[SITE].shape[1] == 1
    sampled = [cleo.generate(PROMPT, 8, seed=5, do_sample=True, temperature=2.0).ids for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert sampled[0][0] != truth[: len(sampled[0][0])]
    assert all(turn.ranks.get(0, ("", 0, 12))[2] == 12 for turn in heard)
    server.workshop.limit("tokens=20")
    with pytest.raises(InputError, match="you may have 20 in one run"):
        ben.generate(PROMPT, 12)


def test_worlds_of_idle_guests_are_dropped_and_they_are_told(three, server):
    ann, ben, _ = three
    for guest in (ann, ben):
        guest.hook(SITE, Declared("zero"), name="mine")
    server.workshop.idle_minutes = 0.0
    while any(guest.tenant is not None for guest in server.workshop.guests):
        threading.Event().wait(0.05)  # polling for the gateway's own sign
    server.workshop.idle_minutes = 60.0
    again = Guest.join(ann.address)
    assert "your hooks and runs were dropped" in again.notice
    assert len(again.hooks) == 0
    said = []
    ben.printer = said.append
    ben.run(PROMPT)
    assert "your hooks and runs were dropped" in "".join(said), "without joining again, with the next run"


def test_what_is_the_owners_is_refused(three, server):
    ann = three[0]
    for ask in (
        lambda: ann.trace(PROMPT, "x"),
        lambda: ann.load("x"),
        lambda: ann.recover(force=True),
        lambda: ann.adapter(SITE),
        lambda: ann.shutdown_engines,
    ):
        with pytest.raises(ClusterError, match="owner's"):
            ask()
    server.workshop.no_boxes = "no walls here"
    with pytest.raises(HookError, match="code are off"):
        ann.hook(SITE, "import os; os.abort()")
    with pytest.raises(InputError):
        ann.hook(SITE, "", when="__import__('os').abort()")
    with pytest.raises(InputError):
        ann._link.ask("hook", sites=[SITE], when="1")
    with pytest.raises(InputError, match="regular expressions"):
        ann.hook("/(a+)+b/", Declared("zero"))
    with pytest.raises(InputError, match="owner's"):
        ann.run(PROMPT, backward="logits.sum()")
    assert len(ann.hooks) == 0


def test_what_the_owner_shows_is_the_owners_tensor_within_a_guests_limits(three, server, loaded):
    ann, ben, _ = three
    owners = loaded.run(PROMPT, capture=SITE)
    assert ann.notices.new() == []
    notice = server.workshop.lesson.show(owners[SITE])
    ann.status()
    assert [n.name for n in ann.notices.new()] == [f"{SITE}:output"]
    assert ann.notices.new() == []
    assert [n.number for n in ben.notices.glance()] == [notice.number]
    assert ben._link._connection.sock.gettimeout() == TIMEOUT, "what comes after it may take its time"
    with ben._link._lock:
        assert ben._link.glance("notices", since=0) is None
    seen, whole = ann.notices.view(), owners[SITE].numpy()
    assert (seen.numpy() == whole).all()
    assert seen.stats() == owners[SITE].stats()
    assert (seen.held(1).numpy() == owners[SITE].held(1).numpy()).all()
    assert list(seen.labels(1)) == list(owners[SITE].labels(1))
    server.workshop.limit("moved=1KB")
    with pytest.raises(InputError, match="bytes a minute"):
        ben.notices.view(notice.number).numpy()
    server.workshop.limit("moved=1GB")
    assert (ben.notices.view(notice.number).numpy() == whole).all()
    with pytest.raises(SiteError, match="not shown any more"):
        ann._link.ask("look", shown=notice.number + 1)
    with pytest.raises(InputError):
        ann._link.ask("hook", sites=[SITE], saved={"run": owners.number, "site": SITE, "shown": 1})
    owners.release()
    with pytest.raises(SiteError):
        ann.notices.view().numpy()
    with pytest.raises(InputError, match="no masks"):
        server.workshop.lesson.show(loaded.run(PROMPT, capture=SITE)[SITE].masked(whole > 0))


def test_one_statistic_of_each_guests_last_run_is_collected_and_guests_are_told(three, server):
    ann, ben, cleo = three
    assert "collect statistics" in ann.notice
    ann.hook(SITE, Declared("scale", (0.25,)))
    ann.run(PROMPT, capture=SITE)
    last = ann.run(PROMPT, capture=SITE)
    ben.run(PROMPT)
    found = server.workshop.lesson.collect(SITE, "norm")
    value = float(torch.linalg.vector_norm(last[SITE].torch().double()))
    assert found.values == {"ann": pytest.approx(value, rel=1e-6)}
    notes = {one.guest: one.note for one in found.found}
    assert SITE in notes["ben"]
    assert "cleo" not in notes or notes["cleo"] == "no run yet"
    assert [one.run for one in found.found if one.guest == "ann"] == [last.number]
    cleo.status()
    assert "collected the norm" in cleo.notices.new()[0].said
    server.workshop.pause()
    assert server.workshop.lesson.collect(SITE, "max").values["ann"] == last[SITE].stats().max
    with pytest.raises(InputError, match="no statistic 'median'"):
        server.workshop.lesson.collect(SITE, "median")
    log = [json.loads(line) for line in server.workshop.journal.path.read_text().splitlines()]
    assert [line["stat"] for line in log if line["what"] == "collect"] == ["norm", "max"]


def test_reading_what_is_up_keeps_no_idle_world(three, server):
    ann, _, _ = three
    ann.hook(SITE, Declared("zero"), name="mine")
    guest = next(guest for guest in server.workshop.guests if guest.name == "ann")
    guest.seen = before = guest.seen - 1000
    ann.notices.all()
    assert guest.seen == before
    ann.status()
    assert guest.seen > before


def test_limits_are_said_and_hold(three, server):
    ann = three[0]
    server.workshop.limit("tokens=5")
    with pytest.raises(InputError, match="you may have 5"):
        ann.run(PROMPT)
    server.workshop.limit("tokens=500 captured=100B")
    with pytest.raises(InputError, match="you may hold 100"):
        ann.run(PROMPT)
    server.workshop.limit("captured=100MB moved=1KB")
    run = ann.run(PROMPT, capture=SITE)
    with pytest.raises(InputError, match="bytes a minute"):
        run[SITE].numpy()
    server.workshop.limit("moved=1GB runs=3")
    with pytest.raises(InputError, match="3 runs a minute"):
        ann.run(PROMPT)
    assert "ann" in str(server.workshop.status())


@pytest.mark.skipif(bool(available()), reason=available() or "boxes can be made")
def test_code_of_guests_runs_in_boxes(three, one_process, edited, ids):
    ann, ben, _ = three
    ann.hook(SITE, "x[:, -1] *= 0.5\nctx['top'] = x[0, -1].max()\nprint('at', site)", name="mine")
    said = []
    ann.printer = said.append
    run = ann.run(PROMPT, capture=SITE)

    def half(out):
        out = out.clone()
        out[:, -1] *= 0.5
        return out

    with torch.no_grad(), edited({SITE: half}) as model:
        truth = model(ids).logits
    with torch.no_grad():
        assert relative(truth, one_process(ids).logits) > 1e-3
    assert relative(run.logits.torch(), truth) < 1e-5
    assert float(run.context["top"]) == pytest.approx(float(run[SITE][0, -1].max()))
    assert "at model.layers.1.mlp" in "".join(said)
    for code, match in (
        ("open('/etc/passwd')", "not permitted"),
        ("x += model.lm_head", "model"),
        ("x *= nowhere", "define the name in the hook itself"),
    ):
        ben.hook(SITE, code, name="bad")
        with pytest.raises(HookError, match=match):
            ben.run(PROMPT)
    assert relative(ann.run(PROMPT).logits.torch(), truth) < 1e-5


@pytest.mark.skipif(bool(available()), reason=available() or "boxes can be made")
def test_code_in_boxes_shares_forwards_once_it_has_run_well(three, server):
    said = {guest.name: [] for guest in three}
    for n, guest in enumerate(three):
        guest.printer = said[guest.name].append
        guest.hook(
            SITE, f"x *= {n + 1} / 4\nctx['top'] = x.abs().max()\nprint('I am {guest.name}')", name="mine"
        )
    asked = [lambda g=g: g.run(PROMPT[: 30 + len(g.name)], capture=SITE) for g in three]
    alone = [ask() for ask in asked]
    server.workshop.pause()
    done = []
    thread = threading.Thread(target=lambda: done.extend(at_once(*asked)))
    thread.start()
    while server.workshop._desk.waiting < 3:
        threading.Event().wait(0.01)  # polling for the gateway's own sign
    server.workshop.resume()
    thread.join()
    lines = [json.loads(line) for line in server.workshop.journal.path.read_text().splitlines()]
    assert [line["together"] for line in lines if line["what"] == "run"] == [1, 1, 1, 3, 3, 3]
    for guest, one, other in zip(three, done, alone, strict=True):
        assert relative(one.logits.torch(), other.logits.torch()) < 1e-5
        assert float(one.context["top"]) == pytest.approx(float(other.context["top"]), rel=1e-5)
        assert "".join(said[guest.name]).count("I am") == 2
        assert "".join(said[guest.name]).count(f"I am {guest.name}") == 2
    assert len({float(run.context["top"]) for run in done}) == 3
    three[0].hook(SITE, "raise ValueError('mine alone')", name="mine")
    found = at_once(*asked)
    assert "mine alone" in str(found[0])
    assert relative(found[1].logits.torch(), alone[1].logits.torch()) < 1e-5


def test_weights_that_change_in_a_run_are_named_and_put_back(loaded, tmp_path):
    weight = "model.layers.1.mlp.down_proj.weight"
    server = Server(Workshop(loaded.cluster_name, trusted=True, journal=tmp_path / "log.jsonl"))
    edit = loaded.model.edit(weight, "x[0] *= 3")
    before = loaded.model.parameter(weight)
    try:
        assert server.workshop.check_weights() == [], "what the owner edits is no alarm"
        ann = Guest.join(address(server), "ann")
        truth = ann.run(PROMPT).logits.numpy()
        ann.hook(SITE, "module.down_proj.weight.mul_(1.5)", name="bad")
        with pytest.raises(FlexError, match=f"changed while this run.*{weight}: put back, bit for bit"):
            ann.run(PROMPT)
        assert "ann" in server.workshop.alarm
        assert weight in server.workshop.alarm
        assert torch.equal(loaded.model.parameter(weight), before), "as the owner had edited it"
        ann.hook(SITE, PAST_TORCH, name="bad")
        ann.run(PROMPT)
        assert not torch.equal(loaded.model.parameter(weight), before), "torch's counter does not see it"
        assert weight in server.workshop.check_weights()
        assert f"in a run of ann: {weight}" in server.workshop.alarm, "the last who had one"
        assert torch.equal(loaded.model.parameter(weight), before)
        ann.hooks["bad"].remove()
        assert (ann.run(PROMPT).logits.numpy() == truth).all(), "the workshop went on by itself"
        assert server.workshop._weights.look() == []
        server.workshop._host.put_back = refuses  # as for a model that was made in a cell
        ann.hook(SITE, "module.down_proj.weight.mul_(1.0)", name="worse")
        with pytest.raises(FlexError, match="the workshop is paused"):
            ann.run(PROMPT)
        assert "made in a cell" in server.workshop.alarm
        ann.hooks["worse"].remove()
        server.workshop.resume()
        assert ann.run(PROMPT).number
    finally:
        server.close()
        edit.undo()


PAST_TORCH = """
part = module.down_proj.weight
part = part.to_local() if hasattr(part, "to_local") else part
part.detach().numpy()[...] *= 2
"""


def refuses(_names):
    raise ModelError("made in a cell")


def test_beyond_this_machine_there_is_tls_and_a_token_for_each(loaded, tmp_path):
    server = open_workshop(loaded.cluster_name, guests=2, host=EVERYWHERE, journal=tmp_path / "log.jsonl")
    try:
        assert set(server.lines) == {"guest1", "guest2"}
        there = Address.read(server.lines["guest2"].split()[-1])
        here = dataclasses.replace(there, host="127.0.0.1")
        guest = Guest(Link(here))
        assert guest.name == "guest2"
        assert guest.run(PROMPT).top(1).rows
        with pytest.raises(ClusterError, match="fingerprint is another"):
            Link(dataclasses.replace(here, fingerprint="0" * 64))
        with pytest.raises(ClusterError):
            Link(dataclasses.replace(here, fingerprint=""))
    finally:
        server.close()
    guest._link.patience = 0.0
    with pytest.raises(ClusterError, match="does not answer"):
        guest.run(PROMPT)


def raw(server, path, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", path, body, {"Content-Type": TYPE, **headers})
        response = connection.getresponse()
        return response.status, response.read()


def test_tokens_that_are_forged_and_requests_that_are_replayed_are_refused(three, server):
    ann = three[0]
    with pytest.raises(ClusterError, match="does not know that token"):
        Link(Address("127.0.0.1", server.port, "x" * 24))
    seat = {"Authorization": f"Bearer {ann._link.facts['seat']}"}
    message = pack({"version": VERSION, "number": 1000, "kind": "hooks"})
    assert raw(server, "/ask", message, seat)[0] == 200
    status, body = raw(server, "/ask", message, seat)
    assert status == 403
    assert "heard before" in unpack(body)[0]["message"]
    assert raw(server, "/ask", message, {"Authorization": "Bearer " + "y" * 24})[0] == 403
    assert raw(server, "/ask", b"nonsense", seat)[0] == 400
    assert raw(server, "/ask", pack({"version": 99, "number": 1001, "kind": "hooks"}), seat)[0] == 400
    assert raw(server, "/ask", message, {**seat, "Origin": "http://evil.example"})[0] == 415
    assert raw(server, "/ask", b"", {**seat, "Content-Length": str(1 << 30)})[0] == 413
    assert raw(server, "/ask", b"", {"Content-Length": str(1 << 30)})[0] == 403, "before anything is read"
    log = server.workshop.journal.path.read_text()
    assert log.count('"refused"') >= 6
    ann._link._number = 2000
    assert relative(ann.run(PROMPT).logits.torch(), three[1].run(PROMPT).logits.torch()) == 0
