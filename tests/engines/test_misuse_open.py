"""What a workshop lets in and lets out: who listens where, and guests who are trusted and should not be."""

import contextlib
import ipaddress

import psutil
import pytest
import torch

from flexmagic.engine.box_walls import available
from flexmagic.errors import FlexError
from flexmagic.workshop import weights_watch
from flexmagic.workshop.address import Address
from flexmagic.workshop.gateway import Workshop
from flexmagic.workshop.guest import Guest
from flexmagic.workshop.link import Link
from flexmagic.workshop.opening import open_workshop
from flexmagic.workshop.serving import Server

from .conftest import PROMPT, relative
from .test_misuse import SITE, Steady, calm_guest, joined, log
from .test_workshop import EVERYWHERE, PAST_TORCH

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def truths(one_process, edited, ids):
    """The logits without a hook, and with the steady guest's."""
    with torch.no_grad():
        plain = one_process(ids).logits
        with edited({SITE: lambda out: out * 0.5}) as model:
            half = model(ids).logits
    assert relative(half, plain) > 1e-3
    return plain, half


# --- guests who are trusted ------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["module.down_proj.weight.mul_(1.5)", PAST_TORCH])
def test_weights_that_a_trusted_guest_writes_into_are_put_back_for_the_others(
    loaded, tmp_path, truths, monkeypatch, code
):
    monkeypatch.setattr(weights_watch, "EVERY", 1)  # else the sums are looked at every hundred runs
    before = loaded.model.parameter(WEIGHT)
    server = Server(Workshop(loaded.cluster_name, trusted=True, journal=tmp_path / "log.jsonl"))
    with contextlib.closing(server):
        calm, bad = calm_guest(server), joined(server, "bad")
        with Steady(calm, truths[1]) as steady:
            steady.once_more()
            bad.hook(SITE, code, name="bad")
            for n in range(2):
                with (
                    contextlib.nullcontext() if code is PAST_TORCH else pytest.raises(FlexError, match=WEIGHT)
                ):
                    bad.run(PROMPT)
                steady.once_more()
                changed = [line for line in log(server) if line["what"] == "weights changed"]
                assert [line["guests"] for line in changed] == [["bad"]] * (n + 1)
                assert {tuple(line["parameters"]) for line in changed} == {(WEIGHT,)}
                assert sum(line["what"] == "weights put back" for line in log(server)) == n + 1
            assert f"in a run of bad: {WEIGHT}. They were put back" in server.workshop.status().title
            bad.hooks["bad"].remove()
            assert relative(bad.run(PROMPT).logits.torch(), truths[0]) < 1e-5
        assert not steady.errors
        assert max(steady.off) < 1e-5
        assert torch.equal(loaded.model.parameter(WEIGHT), before)
        assert server.workshop.check_weights() == []
        calm.stop(), bad.stop()


# --- who listens -----------------------------------------------------------------------------------------


def processes(session):
    """This one, in which the gateway is, the controller's, the engines and all that these have begun."""
    mine, controller = psutil.Process(), session._cluster._cluster.controller.process
    engines = [psutil.Process(seat.pid) for seat in session._calls.ranks.seats]
    boxes = [box for engine in engines for box in engine.children(recursive=True)]
    parts = [controller, *controller.children(recursive=True)]
    return {"gateway": [mine], "engines": engines, "controller": parts, "boxes": boxes}


def listening(found):
    """Where processes of each kind can be reached: kind, address and port."""
    out = set()
    for kind, some in found.items():
        for one in some:
            for connection in one.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    out.add((kind, connection.laddr.ip, connection.laddr.port))
    return out


def beyond(seen):
    """Those of them that are reached from other machines."""
    return {one for one in seen if not ipaddress.ip_address(one[1]).is_loopback}


@pytest.mark.parametrize("host", ["127.0.0.1", EVERYWHERE])
def test_nothing_but_a_gateway_that_is_told_to_listens_beyond_this_machine(loaded, tmp_path, truths, host):
    server = open_workshop(loaded.cluster_name, guests=2, host=host, journal=tmp_path / "log.jsonl")
    with contextlib.closing(server):
        if host == EVERYWHERE:
            there = Address.read(server.lines["guest1"].split()[-1])
            guest = Guest(Link(Address("127.0.0.1", there.port, there.token, there.fingerprint)))
        else:
            guest = joined(server, "ann")
        if not available():
            guest.hook(SITE, "x *= 0.5", name="mine")  # it begins a box
        run = guest.run(PROMPT, capture=SITE)
        assert relative(run.logits.torch(), truths[0 if available() else 1]) < 1e-5
        assert run[SITE].numpy().any(), "values have travelled on all their ways"
        loaded.run(PROMPT, capture=":output.logits").logits.numpy()
        found = processes(loaded)
        seen = listening(found)
        assert available() or found["boxes"]
        assert {kind for kind, _, _ in seen} >= {"gateway", "controller", "engines"}
        open_ = {("gateway", EVERYWHERE, server.port)} if host == EVERYWHERE else set()
        assert beyond(seen) == open_
        assert any(port == server.port for kind, _, port in seen if kind == "gateway")
    assert not any(port == server.port for _, _, port in listening({"gateway": found["gateway"]}))
